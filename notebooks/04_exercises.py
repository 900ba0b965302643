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
# Seven short tasks. Replace each `...` by your code and run the cell, then the check below it, which says
# what is wrong. Hints and solutions are hidden: click on one to see it.

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


def todo(answer, *needed):
    """Whether a task cannot be checked yet."""
    if answer is ...:
        print("Not done yet: replace the ... above, and run both cells.")
    elif any(earlier is ... for earlier in needed):
        print("This one needs your answers to the tasks before: do those first.")
    return answer is ... or any(earlier is ... for earlier in needed)


# %% [markdown]
# ## 1. A random direction
#
# Make **one** random vector of length `RADIUS` in the residual stream, a tensor of shape `[d_model]`.

# %% tags=["answer"]
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
    assert len(vector.unique()) > d_model / 2, "Its entries are hardly random: draw each of them."
    below = float((vector < 0).float().mean())
    assert 0.3 < below < 0.7, (
        f"{below:.0%} of its entries are negative: torch.rand is, torch.randn is not, one-sided."
    )
    print("Right: a direction drawn from a normal distribution is uniform on the sphere.")


check_1(random_vector)

# %% [markdown]
# <details><summary>Hint</summary>
#
# `torch.randn(d_model)` has a direction that is uniform on the sphere, but the wrong length.
# </details>
#
# <details><summary>Solution</summary>
#
# ```python
# random_vector = torch.randn(d_model)
# random_vector = RADIUS * random_vector / random_vector.norm()
# ```
# </details>
#
# ## 2. What it does
#
# How long is the effect of your vector at the target layer, at the **last** token? One number.
# `f.delta` takes a matrix of vectors, `[vector, d_model]`, and gives `[vector, prompt, pos, d_model]`.

# %% tags=["answer"]
effect_of_random = ...


# %%
def check_2(size):
    if todo(size, random_vector):
        return
    assert torch.as_tensor(size).numel() == 1, (
        f"{torch.as_tensor(size).numel()} numbers; one is wanted."
    )
    with torch.no_grad():
        delta = f.delta(random_vector[None])
    wanted, size, everywhere = float(delta[0, 0, -1].norm()), float(size), float(delta.norm())
    assert size == size, "That is not a number (NaN)."
    assert abs(size - everywhere) > 1e-3 * everywhere, (
        "That is over all tokens together; take the last alone: [0, 0, -1]."
    )
    assert abs(size - wanted) < 1e-3 * wanted, "Another number. Is it the norm of delta[0, 0, -1]?"
    print(f"Right: {wanted:.1f}, from a vector of length {RADIUS:g}.")


check_2(effect_of_random)

# %% [markdown]
# <details><summary>Hint</summary>
#
# `theta[None]` makes a matrix of one row from a vector; `.norm()` is the length.
# </details>
#
# <details><summary>Solution</summary>
#
# ```python
# with torch.no_grad():
#     effect_of_random = f.delta(random_vector[None])[0, 0, -1].norm()
# ```
# </details>
#
# ## 3. Vectors that do more
#
# Find **four** MELBO vectors of length `RADIUS`, orthogonal to each other.

# %% tags=["answer"]
found = ...


# %%
def check_3(vectors):
    if todo(vectors):
        return
    assert isinstance(vectors, tm.SteeringVectors), "Take what tm.melbo returns, as it is."
    assert vectors.story.get("method") == "melbo", "These were not found by tm.melbo."
    assert len(vectors) == 4, f"There are {len(vectors)}; four are wanted."
    lengths = [round(norm, 3) for norm in vectors.norms.tolist()]
    assert all(abs(norm - RADIUS) < 1e-3 for norm in lengths), (
        f"Their lengths are {lengths}, and should be {RADIUS}."
    )
    cosines = tm.analysis.cosine_similarity(vectors) - torch.eye(4)
    assert float(cosines.abs().max()) < 1e-4, (
        "They are not orthogonal; pass orthogonal=True, or leave it out."
    )
    with torch.no_grad():
        last = f.delta(vectors.vectors)[:, 0, -1].norm(dim=-1)
    print(f"Right: they change the last token by {', '.join(f'{x:.0f}' for x in last.tolist())}.")


check_3(found)

# %% [markdown]
# <details><summary>Hint</summary>
#
# `help(tm.melbo)`: the first three arguments are enough.
# </details>
#
# <details><summary>Solution</summary>
#
# ```python
# found = tm.melbo(f, 4, RADIUS)
# ```
# </details>
#
# ## 4. Read the outputs
#
# Let the model write `MAX_NEW_TOKENS` tokens after `PROMPT` under each of the four, at scales 1 **and** −1.

# %% tags=["answer"]
texts = ...


# %%
def check_4(frame):
    if todo(frame, found):
        return
    wanted = {"vector", "scale", "prompt", "completion"}
    assert wanted <= set(getattr(frame, "columns", ())), "Take what tm.generate returns, as it is."
    assert set(frame["scale"]) == {1.0, -1.0}, (
        f"Scales {sorted(set(frame['scale']))}; 1 and -1 are wanted."
    )
    assert set(frame["vector"]) == {0, 1, 2, 3}, "All four vectors are wanted, once for each scale."
    assert len(frame) == 8, f"{len(frame)} rows; two scales of four vectors are eight."
    assert set(frame["prompt"]) == {PROMPT}, f"After {PROMPT!r}, please."
    again = tm.generate(model, PROMPT, found[2], max_new_tokens=MAX_NEW_TOKENS)["completion"][0]
    theirs = frame.loc[(frame["vector"] == 2) & (frame["scale"] == 1), "completion"].iloc[0]
    assert theirs == again, (
        f"Under vector 2 of `found` the model writes {again!r}. Did you give max_new_tokens=MAX_NEW_TOKENS, "
        "and leave `chat` out?"
    )
    print("Right. Now read them: which is the most interesting?")


check_4(texts)

# %% [markdown]
# <details><summary>Hint</summary>
#
# `scales=[1, -1]`; vectors from chat prompts are tried with chat prompts by themselves.
# </details>
#
# <details><summary>Solution</summary>
#
# ```python
# texts = tm.generate(model, PROMPT, found, scales=[1, -1], max_new_tokens=MAX_NEW_TOKENS)
# texts
# ```
# </details>
#
# ## 5. Orthogonal is not different
#
# The four vectors are orthogonal. Are their *effects*? Compute the 4 × 4 matrix of cosines between what
# they do at the last three tokens.

# %% tags=["answer"]
cosines = ...


# %%
def check_5(matrix):
    if todo(matrix, found):
        return
    matrix = torch.as_tensor(matrix)
    assert tuple(matrix.shape) == (4, 4), f"Its shape is {tuple(matrix.shape)}; 4 x 4 is wanted."
    off = matrix - torch.eye(4)
    assert float(matrix.diagonal().min()) > 0.999, (
        "The diagonal should be 1: each effect with itself."
    )
    assert float(off.abs().max()) > 1e-4, "That is of the vectors. What of f.delta(vectors)?"
    with torch.no_grad():
        wanted = tm.analysis.cosine_similarity(f.delta(found.vectors, positions=slice(-3, None)))
        everywhere = tm.analysis.cosine_similarity(f.delta(found.vectors))
    assert not torch.allclose(matrix, everywhere, atol=1e-3), (
        "That is over all tokens, of which the first drowns all others: positions=slice(-3, None)."
    )
    assert torch.allclose(matrix, wanted, atol=1e-3), (
        "Other cosines. Are they of `found`, at the last three tokens?"
    )
    print(f"Right: up to {float(off.abs().max()):.2f}, though the vectors are orthogonal.")


check_5(cosines)

# %% [markdown]
# <details><summary>Hint</summary>
#
# `f.delta(found.vectors, positions=slice(-3, None))`, and `tm.analysis.cosine_similarity` takes effects too.
# </details>
#
# <details><summary>Solution</summary>
#
# ```python
# with torch.no_grad():
#     effects = f.delta(found.vectors, positions=slice(-3, None))
# cosines = tm.analysis.cosine_similarity(effects)
# ```
# </details>
#
# ## 6. How much is too much?
#
# For vector 1, at which of the scales 0.25, 0.5, 1, 2 and 4 is the next token's KL to the unsteered model
# **largest**? Give the scale.

# %% tags=["answer"]
largest_at = ...


# %%
def check_6(scale):
    if todo(scale, found):
        return
    scales = [0.25, 0.5, 1, 2, 4]
    swept = tm.analysis.scale_sweep(model, PROMPT, found[1], scales, max_new_tokens=1)
    wanted = float(swept.loc[swept["kl"].idxmax(), "scale"])
    assert getattr(scale, "ndim", 0) == 0, "One number is wanted: the column `scale` of that row."
    assert float(scale) in scales, f"{scale} is none of {scales}. Is it the row? Take its scale."
    assert float(scale) == wanted, f"At {scale} it is not the largest; look at the column kl again."
    print(f"Right: at {wanted:g}. Read what it writes there, too.")


check_6(largest_at)

# %% [markdown]
# <details><summary>Hint</summary>
#
# `tm.analysis.scale_sweep` gives a frame with the columns `scale` and `kl`; a column's `idxmax` helps.
# </details>
#
# <details><summary>Solution</summary>
#
# ```python
# swept = tm.analysis.scale_sweep(model, PROMPT, found[1], [0.25, 0.5, 1, 2, 4])
# largest_at = swept.loc[swept["kl"].idxmax(), "scale"]
# swept
# ```
# </details>
#
# ## 7. A follower
#
# Find a vector that is orthogonal to vector 3 and does what it does: its `tm.analysis.effect_distance` from
# vector 3 is to be below a quarter of that of no vector, a row of zeros.

# %% tags=["answer"]
follower = ...


# %%
def check_7(vectors):
    if todo(vectors, found):
        return
    assert isinstance(vectors, tm.SteeringVectors), "Take what tm.melbo_ortho returns, as it is."
    assert len(vectors) == 1, f"There are {len(vectors)}; one is wanted."
    cosine = float(tm.analysis.cosine_similarity(vectors, found[3]))
    assert abs(cosine) < 1e-4, f"It is not orthogonal to found[3]: their cosine is {cosine:.2f}."
    nothing = float(tm.analysis.effect_distance(f, torch.zeros(1, d_model), found[3]))
    share = float(tm.analysis.effect_distance(f, vectors, found[3])) / nothing
    assert share < 0.25, (
        f"Its distance is {share:.0%} of that of no vector. Does it follow found[3], with enough steps?"
    )
    print(f"Right: {share:.1%} of the distance is left, by a vector orthogonal to the first.")


check_7(follower)

# %% [markdown]
# <details><summary>Hint</summary>
#
# `tm.melbo_ortho(f, theta0, n_vectors)`, with a library of one vector as theta0.
# </details>
#
# <details><summary>Solution</summary>
#
# ```python
# follower = tm.melbo_ortho(f, found[3], 1)
# follower.table()
# ```
# </details>
