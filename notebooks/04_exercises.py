# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Exercises
#
# Seven short tasks. Replace each `...` by your code and run the cell; the check below it says what is
# wrong. Hints and solutions are hidden: click on them to see one.

# %% tags=["parameters"]
MODEL = None  # None is the embedded SmolLM2-135M-Instruct; or a hub id, a folder, a .gguf file
PROMPT = "Tell me about yourself."
SOURCE_LAYER, TARGET_LAYER = 8, 16
RADIUS = 12.0
MAX_NEW_TOKENS = 20

# %%
import torch

import tl_melbo as tm

model = tm.load_model(MODEL)
f = tm.ActivationMap.from_prompts(model, PROMPT, SOURCE_LAYER, TARGET_LAYER, chat=True)
d_model = f.x.shape[-1]


def todo(answer):
    """Whether a task has not been tried yet."""
    if answer is ...:
        print("Not done yet: replace the ... above, and run both cells.")
    return answer is ...


# %% [markdown]
# ## 1. A random direction
#
# Make **one** random vector of length `RADIUS` in the residual stream, a tensor of shape `[d_model]`.

# %%
random_vector = ...


# %%
def check_1(vector):
    if todo(vector):
        return
    assert isinstance(vector, torch.Tensor), (
        f"A tensor is wanted; this is a {type(vector).__name__}."
    )
    assert vector.shape == (d_model,), (
        f"Its shape is {tuple(vector.shape)}, and should be ({d_model},)."
    )
    norm = float(vector.norm())
    assert abs(norm - RADIUS) < 1e-3, (
        f"Its length is {norm:.3f}, and should be {RADIUS}: divide, then multiply."
    )
    assert (vector != 0).sum() > 1, "That is an axis, not a random direction: draw every entry."
    print("Right: a direction drawn from a normal distribution is uniform on the sphere.")


check_1(random_vector)

# %% [markdown]
# <details><summary>Hint</summary>
#
# `torch.randn(d_model)` has a direction that is uniform on the sphere, but the wrong length.
# </details>

# %% tags=["solution"] jupyter={"source_hidden": true}
solution_1 = torch.randn(d_model, generator=torch.Generator().manual_seed(1))
solution_1 = RADIUS * solution_1 / solution_1.norm()
check_1(solution_1)

# %% [markdown]
# ## 2. What it does
#
# How long is the effect of your vector at the target layer, at the **last** token? One number.
# `f.delta` takes a matrix of vectors, `[vector, d_model]`, and gives `[vector, prompt, pos, d_model]`.

# %%
effect_of_random = ...


# %%
def check_2(size):
    if todo(size):
        return
    with torch.no_grad():
        delta = f.delta(solution_1[None] if random_vector is ... else random_vector[None])
    wanted = float(delta[0, 0, -1].norm())
    size = float(size)
    everywhere = float(delta.norm())
    assert abs(size - everywhere) > 1e-3 * everywhere, (
        "That is over all tokens together; take the last alone: [0, 0, -1]."
    )
    assert abs(size - wanted) < 1e-3 * wanted, (
        f"It is {wanted:.3f}, not {size:.3f}. Is it the norm of delta[0, 0, -1]?"
    )
    print(f"Right: {wanted:.1f}, from a vector of length {RADIUS:g}.")


check_2(effect_of_random)

# %% [markdown]
# <details><summary>Hint</summary>
#
# `theta[None]` makes a matrix of one row from a vector; `.norm()` is the length.
# </details>

# %% tags=["solution"] jupyter={"source_hidden": true}
with torch.no_grad():
    solution_2 = f.delta((solution_1 if random_vector is ... else random_vector)[None])[
        0, 0, -1
    ].norm()
check_2(solution_2)

# %% [markdown]
# ## 3. Vectors that do more
#
# Find **four** MELBO vectors of length `RADIUS`, orthogonal, with seed 0.

# %%
found = ...


# %%
def check_3(vectors):
    if todo(vectors):
        return
    assert isinstance(vectors, tm.SteeringVectors), "Take what tm.melbo returns, as it is."
    assert len(vectors) == 4, f"There are {len(vectors)}; four are wanted."
    chosen = vectors.story["hyperparameters"]
    assert chosen["radius"] == RADIUS, (
        f"Their length is {chosen['radius']}, and should be {RADIUS}."
    )
    assert chosen["orthogonal"], (
        "These were found each by itself; pass orthogonal=True, or leave it out."
    )
    assert vectors.story["seed"] == 0, "Another seed: leave it out, and it is 0."
    with torch.no_grad():
        last = f.delta(vectors.vectors)[:, 0, -1].norm(dim=-1)
        random = f.delta(solution_1[None])[0, 0, -1].norm()
    print(
        f"Right: they do {', '.join(f'{x:.0f}' for x in last.tolist())}; the random one did {random:.0f}."
    )


check_3(found)

# %% [markdown]
# <details><summary>Hint</summary>
#
# `help(tm.melbo)`: the first three arguments are enough.
# </details>

# %% tags=["solution"] jupyter={"source_hidden": true}
solution_3 = tm.melbo(f, 4, RADIUS)
check_3(solution_3)

# %% [markdown]
# ## 4. Read the outputs
#
# Let the model write `MAX_NEW_TOKENS` tokens after `PROMPT` under each of the four, at scales 1 **and** −1.

# %%
texts = ...


# %%
def check_4(frame):
    if todo(frame):
        return
    assert "completion" in getattr(frame, "columns", ()), "Take what tm.generate returns, as it is."
    assert set(frame["scale"]) == {1.0, -1.0}, (
        f"Scales {sorted(set(frame['scale']))}; 1 and -1 are wanted."
    )
    assert set(frame["vector"]) == {0, 1, 2, 3}, "All four vectors are wanted, once for each scale."
    assert len(frame) == 8, f"{len(frame)} rows; two scales of four vectors are eight."
    print("Right. Now read them: which is the most interesting?")


check_4(texts)

# %% [markdown]
# <details><summary>Hint</summary>
#
# `scales=[1, -1]`; vectors from chat prompts are tried with chat prompts by themselves.
# </details>

# %% tags=["solution"] jupyter={"source_hidden": true}
solution_4 = tm.generate(model, PROMPT, solution_3, scales=[1, -1], max_new_tokens=MAX_NEW_TOKENS)
check_4(solution_4)
solution_4

# %% [markdown]
# ## 5. Orthogonal is not different
#
# The four vectors are orthogonal. Are their *effects*? Compute the 4 × 4 matrix of cosines between what
# they do at the last three tokens.

# %%
cosines = ...


# %%
def check_5(matrix):
    if todo(matrix):
        return
    assert tuple(matrix.shape) == (4, 4), f"Its shape is {tuple(matrix.shape)}; 4 x 4 is wanted."
    off = matrix - torch.eye(4)
    assert float(matrix.diagonal().min()) > 0.999, (
        "The diagonal should be 1: each effect with itself."
    )
    assert float(off.abs().max()) > 1e-4, "That is of the vectors. What of f.delta(vectors)?"
    with torch.no_grad():
        delta = f.delta(solution_3.vectors, positions=slice(-3, None))
    wanted = tm.analysis.cosine_similarity(delta)
    assert torch.allclose(matrix, wanted, atol=1e-3), (
        "These are other cosines: the first token drowns all others unless positions=slice(-3, None)."
    )
    print(f"Right: up to {float(off.abs().max()):.2f}, though the vectors are orthogonal.")


check_5(cosines)

# %% [markdown]
# <details><summary>Hint</summary>
#
# `f.delta(found.vectors, positions=slice(-3, None))`, and `tm.analysis.cosine_similarity` takes effects too.
# </details>

# %% tags=["solution"] jupyter={"source_hidden": true}
with torch.no_grad():
    solution_5 = tm.analysis.cosine_similarity(
        f.delta(solution_3.vectors, positions=slice(-3, None))
    )
check_5(solution_5)

# %% [markdown]
# ## 6. How much is too much?
#
# For vector 1, at which of the scales 0.25, 0.5, 1, 2 and 4 is the next token's KL to the unsteered model
# **largest**? Give the scale.

# %%
largest_at = ...


# %%
def check_6(scale):
    if todo(scale):
        return
    swept = tm.analysis.scale_sweep(
        model, PROMPT, solution_3[1], [0.25, 0.5, 1, 2, 4], max_new_tokens=1
    )
    wanted = float(swept.loc[swept["kl"].idxmax(), "scale"])
    assert float(scale) == wanted, f"At {scale} it is not the largest; look at the column kl again."
    print(
        f"Right: at {wanted:g}. More length is more change, until the text falls apart: read it there."
    )


check_6(largest_at)

# %% [markdown]
# <details><summary>Hint</summary>
#
# `tm.analysis.scale_sweep` gives a frame with the columns `scale` and `kl`; a frame's `idxmax` helps.
# </details>

# %% tags=["solution"] jupyter={"source_hidden": true}
table = tm.analysis.scale_sweep(
    model, PROMPT, solution_3[1], [0.25, 0.5, 1, 2, 4], max_new_tokens=MAX_NEW_TOKENS
)
solution_6 = table.loc[table["kl"].idxmax(), "scale"]
check_6(solution_6)
table[["scale", "kl", "completion"]]

# %% [markdown]
# ## 7. A follower
#
# Find one vector that is orthogonal to vector 3 and does what it does, and say how near it came: its
# distance, as a share of the distance without any vector.

# %%
share = ...


# %%
def check_7(value):
    if todo(value):
        return
    value = float(value)
    assert value > 0, "A distance is positive."
    assert value < 1, (
        "A share above 1 is worse than no vector at all; did you divide the right way?"
    )
    follower = tm.melbo_ortho(f, solution_3[3], 1)
    nothing = float(tm.analysis.effect_distance(f, torch.zeros(1, d_model), solution_3[3]))
    wanted = float(follower.columns["distance"][0]) / nothing
    assert abs(value - wanted) < 0.02, f"{value:.3f}; it should be near {wanted:.3f}."
    print(f"Right: {wanted:.1%} of the way is left, by a vector orthogonal to the first.")


check_7(share)

# %% [markdown]
# <details><summary>Hint</summary>
#
# `tm.melbo_ortho(...).columns["distance"]`, and `tm.analysis.effect_distance` with a row of zeros.
# </details>

# %% tags=["solution"] jupyter={"source_hidden": true}
follower = tm.melbo_ortho(f, solution_3[3], 1)
without = tm.analysis.effect_distance(f, torch.zeros(1, d_model), solution_3[3])
solution_7 = float(follower.columns["distance"][0]) / float(without)
check_7(solution_7)
