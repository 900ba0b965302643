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
# # MELBO from scratch
#
# A language model can do things that nobody asked it for. **MELBO** looks for them without labels: it
# searches for a vector at an early layer that changes a later layer as much as possible. In this notebook
# you write it yourself, in about 40 lines.
#
# **You will be able to**
#
# * add a vector to the residual stream with a hook, and measure its effect at a later layer;
# * find vectors of a large effect by gradient ascent on a sphere, and by power iteration;
# * say what MELBO finds when its vectors are short, and from which norm on it finds something else;
# * recognise the trap of the first token.
#
# **You need** Python, tensors and gradients in torch, and what a transformer block is. **Time:** 90 to 120
# minutes with the exercises; the cells alone run in a few minutes on two cores.
#
# **Before you run anything, write down a guess:** take a random direction in the residual stream and the best
# one that a search can find, of the same norm. How many times larger is the effect of the best one, at the
# later layer? 1.2 times, 2 times, 10 times?
#
# **Another model** takes other values in the next cell, and no other change. The kept output is that of the bundled model. So
# is what the text says of sizes: how many times larger an effect is, and from which radius on curves part.

# %% tags=["parameters"]
MODEL = None  # None is the bundled SmolLM2-135M-Instruct; or a hub id, a folder, a .gguf file
PROMPT = "Tell me about yourself."
CHAT = True  # False for a base model, which has no chat template
SOURCE_LAYER, TARGET_LAYER = 8, 16  # None, None: a quarter and half of another model's depth
RADIUS = 12.0  # the norm of the vectors; None, for another model, measures one to begin with
N_STEPS = 50  # gradients of the slow search
MAX_NEW_TOKENS = 25

# %%
import torch

import tl_melbo as tm
from tl_melbo.course import from_scratch as check
from tl_melbo.course import lines
from tl_melbo.model.tokens import as_seen, to_tokens

model = tm.load_model(MODEL)
if SOURCE_LAYER is None:
    SOURCE_LAYER, TARGET_LAYER = model.cfg.n_layers // 4, model.cfg.n_layers // 2
tokens = to_tokens(model, PROMPT, CHAT)
print(as_seen(model, PROMPT, CHAT))

# %% [markdown]
# That is the prompt as the model reads it: `PROMPT` inside the chat template. If there is a system message, the
# template brought it along. Keep it in mind when you read what the model writes.
#
# `f` is this package's map between the two layers. The checks compare your work with it.

# %%
f = tm.ActivationMap.from_prompts(model, PROMPT, SOURCE_LAYER, TARGET_LAYER, chat=CHAT)
RADIUS = RADIUS or tm.calibrate_radius(f)
start = tm.random_vectors(f, 1, radius=RADIUS, seed=0).vectors[0]  # a random vector of norm RADIUS
LAST = slice(-3, None)  # the last three tokens of the prompt
f

# %% [markdown]
# ## 1. A hook that adds a vector
#
# **Difficulty** 🔴🔴⚪⚪⚪ · **Importance** 🔵🔵🔵🔵⚪ · up to 10 minutes
#
# The residual stream after block `l` passes the hook point `blocks.{l}.hook_resid_post`, as a tensor
# `[batch, pos, d_model]`. Write a function that gives the model's logits for `tokens` while `theta` is added after
# block `SOURCE_LAYER`, at every position.


# %% tags=["answer"]
def steered_logits(theta):
    """Logits [batch, pos, d_vocab] of `tokens`, with theta [d_model] added after SOURCE_LAYER."""
    return ...


# %%
check.hook(steered_logits, f)

# %% [markdown]
# <details><summary>Hint</summary>
#
# `model.run_with_hooks(tokens, fwd_hooks=[(name, function)])` calls `function(resid, hook)`, and goes on with
# what it returns.
# </details>
#
# <details><summary>Solution</summary>
#
# ```python
# def steered_logits(theta):
#     def add(resid, hook):
#         return resid + theta
#
#     place = f"blocks.{SOURCE_LAYER}.hook_resid_post"
#     with torch.no_grad():
#         return model.run_with_hooks(tokens, fwd_hooks=[(place, add)])
# ```
# </details>
#
# ## 2. The effect
#
# **Difficulty** 🔴🔴⚪⚪⚪ · **Importance** 🔵🔵🔵🔵🔵 · up to 15 minutes
#
# Let $x$ be the residual stream after the source layer, and $f$ the map from there to the target layer. The
# **effect** of a vector is
#
# $$\Delta(\theta) = f(x + \theta) - f(x) .$$
#
# Compute it from two runs of the whole model, one of them steered, for any tokens: the check gives it others than the
# prompt's.


# %% tags=["answer"]
def delta(theta, tokens):
    """The effect of theta after TARGET_LAYER on the stream of these tokens, [pos, d_model]."""
    return ...


# %%
check.effect(delta, f)

# %% [markdown]
# <details><summary>Hint</summary>
#
# A second hook, at the target layer, can put the residual stream into a dictionary. Or nest
# `model.hooks(fwd_hooks=[...])` and `model.run_with_cache(tokens)`.
# </details>
#
# <details><summary>Solution</summary>
#
# ```python
# def delta(theta, tokens):
#     kept = []
#
#     def keep(resid, hook):
#         kept.append(resid[0].clone())
#
#     target = (f"blocks.{TARGET_LAYER}.hook_resid_post", keep)
#     source = (f"blocks.{SOURCE_LAYER}.hook_resid_post", lambda resid, hook: resid + theta)
#     with torch.no_grad():
#         model.run_with_hooks(tokens, fwd_hooks=[target])
#         model.run_with_hooks(tokens, fwd_hooks=[source, target])
#     unsteered, steered = kept
#     return steered - unsteered
# ```
# </details>
#
# From here on we use `f.delta(vectors)`. It is your function for the prompt and several vectors at once,
# `[vector, prompt, pos, d_model]`; it runs only the blocks between the two layers, and it has a gradient.
#
# ## 3. Predict: which of these was found?
#
# **Difficulty** 🔴⚪⚪⚪⚪ · **Importance** 🔵🔵🔵⚪⚪ · up to 5 minutes
#
# Four vectors of the same norm: three are random, one was found by `tm.melbo`. Here is what the model writes
# under each. Which one was found? Say first *why* you think so.

# %%
found = tm.melbo(f, 2, RADIUS)
random = tm.random_vectors(f, 3, RADIUS, seed=1)
texts = tm.generate(
    model, PROMPT, tm.concatenate([found[1], random]), max_new_tokens=MAX_NEW_TOKENS
)
texts = [*texts["completion"]]
check.quiz(texts)

# %% tags=["answer"]
guess = ...  # a letter: "A", "B", "C" or "D"

# %%
check.guess(guess, texts)

# %% [markdown]
# <details><summary>Hint</summary>
#
# Three of the texts are about the same thing.
# </details>
#
# <details><summary>Solution</summary>
#
# ```python
# table = check.quiz(texts)
# guess = table["text"][[*table["completion"]].index(texts[0])]
# ```
# </details>
#
# ## 4. The objective, and a walk uphill
#
# **Difficulty** 🔴🔴🔴🔴⚪ · **Importance** 🔵🔵🔵🔵🔵 · up to 25 minutes
#
# MELBO looks for the vector of norm $R$ with the largest effect at the last tokens of the prompt:
#
# $$\max_{\|\theta\| = R} \; \Big( \sum_{\text{last 3 tokens}} \| \Delta(\theta)_{\text{token}} \|_2^2 \Big)^{1/2}$$
#
# (The published objective has two exponents, p and q; this is p = q = 2.) First the number itself, with a gradient:


# %% tags=["answer"]
def objective(theta):
    """The size of the effect of theta [d_model] at the last three tokens: one number."""
    return ...


# %%
check.objective(objective, f)

# %% [markdown]
# Now climb. Take a step along the gradient; the step leaves the sphere, so go back onto it. The part of the
# gradient along `theta` only changes the norm: take it away first. Steps of 0.1 to 0.3 times `RADIUS` work well. The
# check asks for at least 90% of the objective of `tm.melbo`'s first vector. It also tries your function from another
# start, for two steps.


# %% tags=["answer"]
def climb(theta, n_steps):
    """The best vector of norm RADIUS that it comes to, and the objective at the start and after each step."""
    return ...


# %%
climbed = climb(start, N_STEPS)
check.climbed(climbed, f, RADIUS, reference=found, n_gradients=N_STEPS, search=climb)

# %% [markdown]
# One hint for both halves:
#
# <details><summary>Hint</summary>
#
# `f.delta(theta[None], positions=LAST)[0, 0]` is zero outside the last three tokens. In each step:
# `theta = theta.detach().requires_grad_()`, then `torch.autograd.grad(objective(theta), theta)`.
# </details>
#
# The objective:
#
# <details><summary>Solution</summary>
#
# ```python
# def objective(theta):
#     return f.delta(theta[None], positions=LAST)[0, 0].square().sum().sqrt()
# ```
# </details>
#
# The climb. Exercises 5 and 7 use its `gradient` again in their solutions:
#
# <details><summary>Solution</summary>
#
# ```python
# def gradient(theta):
#     theta = theta.detach().requires_grad_()
#     value = objective(theta)
#     (slope,) = torch.autograd.grad(value, theta)
#     return float(value.detach()), slope
#
#
# def climb(theta, n_steps):
#     history, best = [], theta
#     for step in range(n_steps):
#         value, slope = gradient(theta)
#         history.append(value)
#         if value == max(history):
#             best = theta
#         unit = theta / theta.norm()
#         slope = slope - (slope @ unit) * unit
#         theta = theta + 0.2 * RADIUS * slope / slope.norm()
#         theta = RADIUS * theta / theta.norm()
#     with torch.no_grad():
#         history.append(float(objective(theta)))
#     return (theta if history[-1] == max(history) else best), history
# ```
# </details>
#
# ## 5. Larger steps: power iteration
#
# **Difficulty** 🔴🔴🔴⚪⚪ · **Importance** 🔵🔵🔵⚪⚪ · up to 15 minutes
#
# The boldest step forgets where it was: $\theta \leftarrow R \, \nabla / \|\nabla\|$. Write it, with at most 10
# gradients, and return the best vector on the way: steps so bold also go down, so the check asks for no more than half
# of `tm.melbo`'s objective. For a short vector $\Delta(\theta) \approx J\theta$. What
# is the gradient of $\tfrac12\|J\theta\|^2$? Why is this called *power iteration*?


# %% tags=["answer"]
def power_iteration(theta, n_steps):
    """The best vector of norm RADIUS that it comes to, and the objective at the start and after each step."""
    return ...


# %%
powered = power_iteration(start, 10)
check.climbed(
    powered, f, RADIUS, reference=found, n_gradients=10, enough=0.5, search=power_iteration
)

# %% [markdown]
# <details><summary>Hint</summary>
#
# It is your `climb` with another step; nothing of the old `theta` is left in the new one. For short vectors the
# gradient of $\tfrac12\|J\theta\|^2$ is $J^\top J\theta$: the step multiplies by one matrix, again and again.
# </details>
#
# <details><summary>Solution</summary>
#
# ```python
# def power_iteration(theta, n_steps):
#     history, best = [], theta
#     for step in range(n_steps):
#         value, slope = gradient(theta)
#         history.append(value)
#         if value == max(history):
#             best = theta
#         theta = RADIUS * slope / slope.norm()
#     with torch.no_grad():
#         history.append(float(objective(theta)))
#     return (theta if history[-1] == max(history) else best), history
# ```
# </details>
#
# `tm.melbo` takes these steps, too, but never accepts one that goes down: it tries a smaller one instead.
# Here is its course for two vectors, from a random start each; and yours, once you have them.

# %%
curves = {}
for number, values in enumerate(found.history.tolist()):
    curves[f"tm.melbo, vector {number}"] = (range(len(values)), values)
for name, answer in (("your climb", climbed), ("your power iteration", powered)):
    if answer is not ...:
        curves[name] = (range(len(answer[1])), answer[1])
lines(curves, "The objective on the way", "steps", "objective")

# %% [markdown]
# Compare the first point of a curve, a random vector, with its last: that is the answer to the guess at the top.
# The first three steps raise the objective severalfold. Later ones may still add much: `tm.melbo` stops after 10
# gradients by default, and your climb, with `N_STEPS`, can end well above it. Is the vector with the larger objective
# the more interesting one? Read:

# %%
read = tm.generate(model, PROMPT, found, max_new_tokens=MAX_NEW_TOKENS)
read.assign(objective=found.objective.tolist())[["vector", "objective", "completion"]]

# %% [markdown]
# The objective only says that something changes. A large one may be gibberish. Which changes are interesting is
# for you to say.
#
# ## 6. How long? What short vectors find
#
# **Difficulty** 🔴🔴🔴🔴⚪ · **Importance** 🔵🔵🔵🔵⚪ · up to 25 minutes
#
# As $R \to 0$, $\Delta(R v) \to R\,J v$ with the Jacobian $J$ at zero, and the best $v$ is the top right **singular
# vector** of $J$. Find it without ever writing $J$ down: from a random $v$, apply $J$ and then $J^\top$, normalise,
# repeat. Return the unit vector, and by how much $J$ stretches it. Write it for any differentiable function `g` of a
# vector. The check calls it with a function whose $J$ is known, then with the effect at the last three tokens.


# %% tags=["answer"]
def top_direction(g):
    """The top right singular vector, of norm 1, of g's Jacobian at zero; and its singular value."""
    return ...


# %%
linear = tm.jacobian(f, 3, RADIUS, positions=LAST)  # this package's answer, by another way
check.top_direction(top_direction, f, linear)

# %% [markdown]
# <details><summary>Hint</summary>
#
# Let `zero` be a vector of zeros. `torch.func.jvp(g, (zero,), (v,))` gives g(0) and J v.
# `_, back = torch.func.vjp(g, zero)` gives a function with `back(u)[0]` = $J^\top u$. Twenty repetitions are enough.
# </details>
#
# <details><summary>Solution</summary>
#
# ```python
# def top_direction(g):
#     zero = torch.zeros_like(start)
#     v = start / start.norm()
#     _, back = torch.func.vjp(g, zero)
#     for _ in range(20):
#         _, stretched = torch.func.jvp(g, (zero,), (v,))
#         v = back(stretched)[0]
#         v = v / v.norm()
#     return v, torch.func.jvp(g, (zero,), (v,))[1].norm()
# ```
# </details>
#
# **Predict before you run:** MELBO at several radii, its vector compared with the top singular vector. Where does
# the cosine leave 1? And which of the two has the larger effect at `RADIUS`?

# %%
J_top = linear.vectors[0] / linear.vectors[0].norm()
radii = [RADIUS * share for share in (0.03, 0.1, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0)]
melbo_at = [tm.melbo(f, 1, radius) for radius in radii]


@torch.no_grad()
def size(vectors):
    """The objective of each vector."""
    return f.delta(vectors, positions=LAST).flatten(1).norm(dim=-1)


cosines = [float((m.vectors[0] @ J_top).abs() / m.norms[0]) for m in melbo_at]
calibrated = tm.calibrate_radius(f)
lines(
    {"MELBO's vector": (radii, cosines)},
    "MELBO leaves the top singular vector of J as the radius grows",
    "radius R", "|cosine| with J's top direction", log="x", mark={"calibrate_radius": calibrated},
)  # fmt: skip

# %%
units = torch.cat([J_top[None], tm.random_vectors(f, 8, 1.0, seed=2).vectors])
per_unit = torch.stack([size(radius * units) / radius for radius in radii])
lines(
    {
        "MELBO's vector": (radii, [float(m.objective[0] / m.norms[0]) for m in melbo_at]),
        "J's top direction": (radii, per_unit[:, 0].tolist()),
        "random, median of 8": (radii, per_unit[:, 1:].median(1).values.tolist()),
    },
    "Effect for each unit of norm", "radius R", "objective / R", log="x",
    mark={"calibrate_radius": calibrated},
)  # fmt: skip

# %% [markdown]
# A linear map would give horizontal lines. At small radii MELBO's vector *is* the top singular vector, up to what
# 10 gradients reach, and they have the same effect. At larger radii the effect of J's direction grows more slowly than
# linearly, while MELBO finds other directions whose effect grows faster. They are what a Jacobian cannot see: the reason to search at a
# finite radius.
#
# `tm.calibrate_radius(f)`, which `radius="auto"` takes, is the radius at which **random** vectors deviate by 40%
# from their linearisation. (Their line is nearly flat: the effect of a random vector turns rather than grows.) MELBO's
# vectors part from J earlier, because they seek the directions that deviate most.
#
# Orthogonality tells the same story. To first order, singular vectors have orthogonal effects. Are they still
# orthogonal at `RADIUS`?

# %%
for radius in (radii[0], RADIUS):
    with torch.no_grad():
        effects = f.delta(linear.vectors * (radius / RADIUS), positions=LAST)
    off = (tm.analysis.cosine_similarity(effects) - torch.eye(3)).abs().max()
    print(f"R = {radius:g}: largest |cosine| between the effects of J's top three: {off:.2f}")

# %% [markdown]
# They are less so, though in the bundled model the largest cosine is still small. The size of the effect, above, shows
# the difference more clearly.
#
# ## 7. A second vector
#
# **Difficulty** 🔴🔴🔴⚪⚪ · **Importance** 🔵🔵🔵⚪⚪ · up to 15 minutes
#
# Started elsewhere, the search may end at the same vector. To get a *library*, each new vector is kept
# orthogonal to the ones before. Find a second vector of norm `RADIUS`, orthogonal to `found.vectors[0]`, with your
# own search. The check asks for at least 90% of the objective of `tm.melbo`'s second vector.

# %% tags=["answer"]
second = ...  # a tensor [d_model]

# %%
check.second(second, found.vectors[0], f, reference=found)

# %% [markdown]
# <details><summary>Hint</summary>
#
# Project the start, every gradient and every iterate onto the complement of the first vector, then normalise.
# </details>
#
# <details><summary>Solution</summary>
#
# ```python
# first = found.vectors[0] / found.norms[0]
# others = tm.random_vectors(f, 2, RADIUS, seed=0).vectors
# theta, tried = others[1], []
# for step in range(20):
#     theta = theta - (theta @ first) * first
#     theta = RADIUS * theta / theta.norm()
#     value, slope = gradient(theta)
#     tried.append((value, theta))
#     slope = slope - (slope @ first) * first
#     theta = theta + RADIUS * slope / slope.norm()
# second = max(tried, key=lambda pair: pair[0])[1]
# ```
# </details>
#
# Orthogonal vectors can have similar effects: nothing in the projection forbids it. The next notebook shows
# pairs that do.
#
# ## 8. The trap
#
# **Difficulty** 🔴🔴⚪⚪⚪ · **Importance** 🔵🔵🔵🔵⚪ · up to 10 minutes
#
# Why the last three tokens, and not all? Four independent searches at **all** positions (a warning tells what
# happens):

# %%
import warnings

with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    trapped = tm.melbo(f, 4, RADIUS, positions=slice(None), orthogonal=False)
print(*(f"Warning: {each.message}" for each in caught[:1]))
tm.plots.cosine_heatmap(
    tm.analysis.cosine_similarity(trapped), "Cosines of four vectors found at all positions"
)

# %% [markdown]
# In the bundled model four random starts end at one direction: red is the same vector, dark blue roughly its negative (a cosine of −0.8). Find out why. Which
# token has the residual stream of the largest norm (`f.x` is `[prompt, pos, d_model]`)? And what
# share of the sum of squares in `trapped[0]`'s objective is at that token?

# %% tags=["answer"]
sink = ...  # the position of a token
sink_share = ...  # between 0 and 1

# %%
check.sink(sink, sink_share, f, trapped)

# %% [markdown]
# <details><summary>Hint</summary>
#
# `f.x[0].norm(dim=-1)`; and the same of `f.delta(trapped.vectors[:1])[0, 0]`, squared.
# </details>
#
# <details><summary>Solution</summary>
#
# ```python
# sink = int(f.x[0].norm(dim=-1).argmax())
# with torch.no_grad():
#     squares = f.delta(trapped.vectors[:1])[0, 0].square().sum(-1)
# sink_share = float(squares[sink] / squares.sum())
# ```
# </details>

# %%
with torch.no_grad():
    everywhere = f.delta(torch.stack([trapped.vectors[0], start]))[:, 0].norm(dim=-1)
places = range(f.x.shape[1])
lines(
    {
        "residual stream after the source layer": (places, f.x[0].norm(dim=-1).tolist()),
        "effect of the vector found at all positions": (places, everywhere[0].tolist()),
        "effect of a random vector": (places, everywhere[1].tolist()),
    },
    "The attention sink", "token", "norm (log)", log="y",
)  # fmt: skip

# %% [markdown]
# In most models the first token is an **attention sink**: heads that look for nothing in the text put their attention
# there. Its residual stream carries a **massive activation**. A vector that disturbs it has a huge effect there, and at
# the tokens that write the answer only about 1.4 times that of the random vector drawn here. All searches fall into that hole. `positions=slice(-3, None)` leaves it out.
#
# ## What to take away
#
# * MELBO is gradient ascent on the size of an effect; power iteration makes it fast, and a safeguard makes it safe.
# * At small radii it is the top singular vector of the Jacobian. At useful radii it is not.
# * The objective measures change, not interest. Where it is measured decides what is found.
#
# ## Bonus, without an answer
#
# * Replace the norm at the target layer by the KL divergence of the next token. What does the search find?
# * Use p = 4 (`tm.melbo_objective`). Which tokens gain weight?
# * Let source and target move. Where does the ratio of found to random effect peak?
#
# ## Sources
#
# * Mack & Turner 2024, [Mechanistically eliciting latent behaviors in language models](https://www.lesswrong.com/posts/ioPnHKFyy4Cw2Gr2x/mechanistically-eliciting-latent-behaviors-in-language-1): MELBO
# * Mack & Turner 2024, "Deep causal transcoding": the calibration of the radius
# * Sun et al. 2024, [Massive activations in large language models](https://arxiv.org/abs/2402.17762); Xiao et al. 2023, [Efficient streaming language models with attention sinks](https://arxiv.org/abs/2309.17453)
#
# **Next:** `01_first_vectors`: a library, and how to read it.
