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
# # How does it do it?
#
# In the bundled model a vector of 576 numbers, added after layer 8, makes the model speak as a person: greedily, as a 25-year-old
# software engineer. This notebook looks inside: *when* in the text, *after which layer*, and *through which parts* of the model.
#
# **You learn to** read a residual stream with the logit lens · find the token where two texts part · patch an
# activation from one run into another, by hand · tell what a patch shows from what it does not show.
#
# **You need** `01_first_vectors`, and PyTorch hooks to the extent of "a hook sees a tensor and may return another".
# **Time** 45 to 60 minutes with the exercises; the cells run in about two minutes on a laptop.
#
# Every picture, or the table or figure right after it, has random vectors of the same norm. Without them, nothing here would say anything
# about *this* vector.
#
# **Another model** takes other values in the next cell, and no other change. That the vector makes a person, and every sentence that begins
# "In the bundled model", is of that model alone. So may be which parts carry the effect: hold the text against your own tables.

# %% tags=["parameters"]
MODEL = None  # None is the bundled SmolLM2-135M-Instruct; or a hub id, a folder, a .gguf file
PROMPT = "Tell me about yourself."
CHAT = True  # False for a base model, which has no chat template
SOURCE_LAYER, TARGET_LAYER = 8, 16  # None, None: a quarter and half of another model's depth
RADIUS = 12.0  # the norm of the vectors; None, for another model, measures one to begin with
CHOSEN = 4  # which vector of the library: read their texts, and choose
N_RANDOM = 8
MAX_NEW_TOKENS = 24

# %%
import pandas as pd
import plotly.express as px
import torch

import tl_melbo as tm
from tl_melbo.course import inside as check
from tl_melbo.model.tokens import to_tokens

model = tm.load_model(MODEL)
if SOURCE_LAYER is None:
    SOURCE_LAYER, TARGET_LAYER = model.cfg.n_layers // 4, model.cfg.n_layers // 2
f = tm.ActivationMap.from_prompts(model, PROMPT, SOURCE_LAYER, TARGET_LAYER, chat=CHAT)
RADIUS = RADIUS or tm.calibrate_radius(f)
chosen = tm.melbo(f, CHOSEN + 1, radius=RADIUS)[CHOSEN]
random = tm.random_vectors(f, N_RANDOM, RADIUS)
both = tm.SteeringVectors(torch.cat([chosen.vectors, random.vectors]), dict(random.story))

texts = tm.generate(model, PROMPT, both, max_new_tokens=MAX_NEW_TOKENS)
unsteered = tm.generate(model, PROMPT, chat=CHAT, max_new_tokens=MAX_NEW_TOKENS)
pd.concat([unsteered, texts[:3]]).assign(what=["unsteered", "found", "random", "random"])[
    ["what", "completion"]
].style.hide(axis="index")

# %% [markdown]
# ## Predict
#
# Write your guesses down before you go on.
#
# 1. In the found vector's text, at which token do the steered and the unsteered model disagree most?
# 2. After which layer can the new behaviour first be read off the residual stream: the source layer, the target layer, or near the last?
# 3. What carries the effect from the source to the target layer: one head, one MLP, many of them, or the vector itself, which
#    just stays in the stream?
#
# ## Where do the texts part?
#
# Both models read the steered text. Colour is KL(steered ‖ unsteered) at each token: how far apart the two are
# about what comes *there*. Hover over a token for what each of them wanted to write.

# %%
divergence = tm.analysis.token_divergence(model, texts, both)
tm.plots.token_divergence(divergence)

# %% [markdown]
# The same for the first random vector, and for all of them in numbers. `first` is the KL at the first token, `largest`
# the largest of the text.

# %%
tm.plots.token_divergence(divergence, vector=1)

# %%
by_vector = divergence.groupby("vector")["kl"].agg(["first", "mean", "max"])
parts = {"found": by_vector[:1], "random, median": by_vector[1:], "random, largest": by_vector[1:]}
pd.DataFrame(
    {name: rows.max() if "largest" in name else rows.median() for name, rows in parts.items()}
).T.rename(columns={"max": "largest"}).round(3)

# %% [markdown]
# The vector's mean is a multiple of the random ones' (compare the rows). But it is not spread evenly: few tokens are
# decisions, and the rest follow from what was already written, for the unsteered model, too.
#
# ## Which next tokens does it promote?
#
# The change of each token's log-probability right after the prompt. Row 0 is the found vector, the others are
# random. Promoted tokens are on the left, suppressed ones on the right.

# %%
tokens = tm.analysis.top_tokens(model, PROMPT, both[:4], n=5)
tm.plots.top_tokens(tokens, title="Next token: found (0) and three random vectors")

# %% [markdown]
# ## After which layer does it show?
#
# The **logit lens** reads the residual stream after *any* layer as if it were the last: final norm, then
# unembedding (nostalgebraist 2020). It is a rough instrument: early layers do not write in the last layer's
# language.
#
# ### Exercise 1: a logit lens
#
# **Difficulty** 🔴🔴⚪⚪⚪ · **Importance** 🔵🔵🔵🔵⚪ · up to 10 minutes
#
# Write a function from one residual vector (`[d_model]`) to the log-probabilities of all tokens (`[d_vocab]`).
# `model.ln_final` and `model.unembed` are modules of the TransformerLens model.

# %% tags=["answer"]
my_lens = ...

# %%
check.lens(my_lens, model, PROMPT, CHAT)

# %% [markdown]
# <details><summary>Hint</summary>
#
# Three steps. A residual vector in the middle of the model is far longer than what the unembedding expects, and
# logits are not log-probabilities.
# </details>
#
# <details><summary>Solution</summary>
#
# ```python
# def my_lens(stream):
#     return model.unembed(model.ln_final(stream)).log_softmax(-1)
# ```
# </details>
#
# The package has the same lens, `top_tokens(..., by_layer=True)`. Layers go up; each row says what the found vector
# has promoted and suppressed *so far*.

# %%
by_layer = tm.analysis.top_tokens(model, PROMPT, both, n=3, by_layer=True)
tm.plots.top_tokens(by_layer, vector=0, title="Logit lens of the found vector")

# %% [markdown]
# In the bundled model the middle layers show large changes of tokens that mean little here: the lens reads a language
# that is not the last layer's. Words of a person come late: "my" at layer 22 and again from 25 to 27 (at 23 and 24 it is suppressed), "Growing" and "born" at layer 28. So "the lens shows it after layer …" needs two conditions: a change, and a sense.
#
# How large are these changes, beside random ones? Take for each layer the largest change of any likely token:

# %%
largest = by_layer.groupby(["layer", "vector"])["log_prob_change"].agg(lambda x: x.abs().max())
wide = largest.unstack("vector").fillna(0.0)
by_what = pd.DataFrame({"found": wide[0], "random, median": wide.drop(columns=0).median(axis=1)})
lens_lines = px.line(
    by_what, markers=True, template="plotly_white", width=720, height=380,
    color_discrete_sequence=["#d55e00", "#57606a"],
    labels={"value": "largest change (nats)", "layer": "after layer", "variable": ""},
    title="Largest change of a next token's log-probability, by the logit lens",
)  # fmt: skip
lens_lines.update_layout(
    meta={"alt": "; ".join(f"{k}: {v.min():.2g} to {v.max():.2g} nats" for k, v in by_what.items())}
)

# %% [markdown]
# And without any lens, as the size of the change in the residual stream:

# %%
sizes = tm.analysis.effect_by_layer(model, PROMPT, {"found": chosen, "random": random})
tm.plots.effect_by_layer(sizes)

# %% [markdown]
# At its own layer each vector has the same size, by construction. The gap opens block by block, up to the target layer,
# where the search measured. So the question is what those blocks do.
#
# ## What carries it?
#
# **Activation patching.** Run the model twice, without the vector and with it. Then run it a third time *without*,
# but let one part (a head, an MLP) put out what it put out in the steered run. What the target layer then does is
# that part's own share of the effect. Both effects are taken at the target layer and the last three tokens of the prompt,
# as in the search:
#
# $$\text{share} = \frac{\langle \text{patched effect}, \text{effect} \rangle}{\| \text{effect} \|^2}$$
#
# ### Exercise 2: one patch by hand
#
# **Difficulty** 🔴🔴🔴🔴⚪ · **Importance** 🔵🔵🔵🔵🔵 · up to 20 minutes
#
# Write `my_patch(layer)`: the residual stream after `TARGET_LAYER`, all tokens, `[1, pos, d_model]`, of an *unsteered* run in which the MLP of `layer`
# alone puts out what it does in the steered one. You need `tm.steered`, `model.run_with_cache` and
# `model.run_with_hooks`, and these hook points:

# %%
input_tokens = to_tokens(model, PROMPT, CHAT)
MLP, STREAM = "blocks.{}.hook_mlp_out", f"blocks.{TARGET_LAYER}.hook_resid_post"
input_tokens.shape, MLP.format(TARGET_LAYER), STREAM

# %% tags=["answer"]
my_patch = ...

# %%
check.patch(my_patch, model, f, chosen)

# %% [markdown]
# <details><summary>Hint</summary>
#
# Inside `with tm.steered(model, chosen):` any call is steered, so `run_with_cache` there gives the steered activations.
# Outside, `model.run_with_hooks(tokens, fwd_hooks=[(name, function), ...])` runs without the vector. A hook
# `function(value, hook)` that returns a tensor replaces the value; one that returns nothing only looks: use one of each.
# </details>
#
# <details><summary>Solution</summary>
#
# ```python
# with torch.no_grad(), tm.steered(model, chosen):
#     _, steered_cache = model.run_with_cache(input_tokens)
#
#
# def my_patch(layer):
#     kept = []
#     hooks = [
#         (MLP.format(layer), lambda value, hook: steered_cache[MLP.format(layer)]),
#         (STREAM, lambda value, hook: kept.append(value)),
#     ]
#     with torch.no_grad():
#         model.run_with_hooks(input_tokens, fwd_hooks=hooks)
#     return kept[0]
# ```
# </details>
#
# ### All parts at once
#
# `analysis.mechanism` does this for every head and every MLP between the two layers. "Direct" is the vector itself: what
# it does when it is added after the *target* layer, with no block in between.

# %%
carried = tm.analysis.mechanism(model, PROMPT, both[:4])
tm.plots.mechanism(
    carried[carried["vector"] == 0], title="Share of the effect that each part carries alone"
)

# %%
rows = []
for vector, own in carried.groupby("vector"):
    shares = {kind: part["share"] for kind, part in own.groupby("component")}
    best = own.loc[shares["mlp"].idxmax()], own.loc[shares["head"].idxmax()]
    rows.append(
        {
            "vector": "found" if vector == 0 else f"random {vector}",
            "direct": shares["direct"].iloc[0],
            "best MLP": f"layer {best[0]['layer']}: {best[0]['share']:.2f}",
            "best head": f"layer {best[1]['layer']} head {best[1]['head']}: {best[1]['share']:.2f}",
            "all MLPs, added up": shares["mlp"].sum(),
            "all heads, added up": shares["head"].sum(),
        }
    )
of_parts = pd.DataFrame(rows).round(2)
of_parts

# %% [markdown]
# **Read the columns against the random rows.** *Direct* is the share of a vector's effect that is the vector itself, still in the
# stream. In the bundled model it is a fifth for random vectors, of a small effect. For the found one it is next to nothing, and its
# effect is several times as large: nearly all of it is made by the blocks. That is what MELBO looks for, a direction
# that the blocks do something *about*. *Best MLP* and *best head* say how much one part carries alone: there the MLPs of
# the last three layers have the largest shares (0.27 to 0.41), and no single part has half.
#
# **What this does not show.** A patch shows what is *enough*, not what is *needed*. Shares do not add up to 1: an MLP's
# steered output already contains what steered parts before it did to it, and the blocks are not linear.
#
# ## Do heads look elsewhere?
#
# The strongest head of the table, for the found vector: where does the last token look, in three runs?

# %%
heads = carried[(carried["vector"] == 0) & (carried["component"] == "head")]
layer, head = (int(heads.loc[heads["share"].idxmax(), name]) for name in ("layer", "head"))
PATTERN = "blocks.{}.attn.hook_pattern"


def patterns(vector=None):
    """Attention of every layer, [layer, head, from, to]."""
    with torch.no_grad():
        if vector is None:
            _, cache = model.run_with_cache(input_tokens)
        else:
            with tm.steered(model, vector):
                _, cache = model.run_with_cache(input_tokens)
    return torch.stack([cache[PATTERN.format(i)][0] for i in range(model.cfg.n_layers)])


seen = {"unsteered": patterns(), "found": patterns(chosen), "random": patterns(random[0])}
words = [f"{i} {model.tokenizer.decode([t])!r}" for i, t in enumerate(input_tokens[0].tolist())]
looks = pd.DataFrame({name: p[layer, head, -1].tolist() for name, p in seen.items()}, index=words)
bars = px.bar(
    looks, barmode="group", template="plotly_white", width=900, height=420,
    color_discrete_sequence=["#57606a", "#d55e00", "#56b4e9"],
    labels={"value": "attention of the last token", "index": "to", "variable": ""},
    title=f"Layer {layer}, head {head}: where the prompt's last token looks",
)  # fmt: skip
most = "; ".join(
    f"{name}: most to {some.idxmax()} ({some.max():.2f})" for name, some in looks.items()
)
bars.update_layout(meta={"alt": f"Layer {layer}, head {head}. {most}"})

# %% [markdown]
# In the bundled model this head looks back at the question, mostly at " yourself". Under the found vector it looks at the
# last token instead; the random vector leaves it alone.
#
# One head is an anecdote. For all heads between the two layers: how much of the attention of the last three tokens moves
# elsewhere (0 to 1: half of the summed absolute change)?

# %%
between = range(SOURCE_LAYER + 1, TARGET_LAYER + 1)


def moved(pattern):
    change = (pattern - seen["unsteered"])[between.start : between.stop, :, -3:]
    return change.abs().sum(-1).mean((1, 2)) / 2


of_random = torch.stack([moved(patterns(random[i])) for i in range(min(4, N_RANDOM))])
attention = pd.DataFrame(
    {
        "found": moved(seen["found"]).tolist(),
        "random, mean of 4": of_random.mean(0).tolist(),
        "random, largest": of_random.amax(0).tolist(),
    },
    index=pd.Index(between, name="layer"),
).round(3)
attention

# %% [markdown]
# ## What you saw
#
# Fill in, from *your* outputs:
#
# * The texts part at token …, where the steered model wants … and the unsteered one ….
# * The lens shows it after layer …; random vectors reach … of that.
# * … % of the effect is the vector itself (random: … %); the best single part carries … %.
# * Attention moves … times as much as under random vectors, most in layer ….
#
# None of this says that the model *has* "a person speaks" as a feature. It says that the blocks between the two layers amplify this
# direction. Whether the model uses it without us is another question: `02_is_it_real` asks it of this vector, and
# `04_orthogonal_families` of a whole family.
#
# ## Bonus, without answers
#
# * Patch the other way: the *unsteered* output of one part into the *steered* run. Which part is needed? Is it the one that
#   is enough?
# * Take the effect at the target layer as a vector, add it there, and generate. Is it the same behaviour?
# * Do the negatives (`-chosen`) go through the same parts?
# * Take vector 1, which in the bundled model repeats the system prompt. Which head looks at the system prompt?
#
# ## Sources
#
# nostalgebraist 2020, [interpreting GPT: the logit lens](https://www.lesswrong.com/posts/AcKRB8wDpdaN6v6ru/interpreting-gpt-the-logit-lens) ·
# Heimersheim and Nanda 2024, [How to use and interpret activation patching](https://arxiv.org/abs/2404.15255) ·
# Mack and Turner 2024, [Mechanistically eliciting latent behaviors in language models](https://www.lesswrong.com/posts/ioPnHKFyy4Cw2Gr2x/mechanistically-eliciting-latent-behaviors-in-language-1)
#
# **Next:** `04_orthogonal_families`: is this the only direction that does it?
