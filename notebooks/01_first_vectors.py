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
# # First vectors
#
# At every layer and token, a language model's state is a vector: the **residual stream**. A **steering vector** is
# a direction that *we* add to it, after one block, at every token. Random directions do little. This notebook finds
# some that do much, without telling the search what to look for, and follows them from a number to a choice.
#
# **You will be able to**
#
# * find a library of vectors with `tm.melbo`, and hold it against random vectors of the same norm;
# * choose a norm by coherence and change, not by the objective;
# * group completions into behaviours, of both signs;
# * choose one vector, and say what you do *not* know about it yet.
#
# **You need** `00_melbo_from_scratch`, or the idea: a vector at an early layer that changes a later one as much as
# possible. **Time:** 60 to 75 minutes with the exercises; the cells alone take a few minutes on two cores.
#
# **Another model** takes other values in the next cell, and no other change. What random vectors do to the text, how effects grow
# after the target layer, and the sentence about an engineer near the end are of the bundled model.

# %% tags=["parameters"]
MODEL = None  # None is the bundled SmolLM2-135M-Instruct; or a hub id, a folder, a .gguf file
FOLDER = "runs/first_vectors"  # of the search: each model and prompt takes one of its own
PROMPT = "Tell me about yourself."
CHAT = True  # False for a base model, which has no chat template
SOURCE_LAYER, TARGET_LAYER = 8, 16  # None, None: a quarter and half of another model's depth
RADIUS = 12.0  # the norm of the vectors; None, for another model, measures one to begin with
N_VECTORS = 16
N_RANDOM = 24
SCALES = [0.1, 0.25, 0.5, 1.0, 2.0, 4.0, 6.0]
CHOSEN = 4  # the vector that the last section looks at: put your own choice here
MAX_NEW_TOKENS = 25

# %%
import pandas as pd
import torch

import tl_melbo as tm
from tl_melbo.course import first_vectors as check
from tl_melbo.course import lines
from tl_melbo.model.tokens import as_seen
from tl_melbo.tables import Table  # a frame that a notebook shows whole

model = tm.load_model(MODEL)
if SOURCE_LAYER is None:
    SOURCE_LAYER, TARGET_LAYER = model.cfg.n_layers // 4, model.cfg.n_layers // 2
f = tm.ActivationMap.from_prompts(model, PROMPT, SOURCE_LAYER, TARGET_LAYER, chat=CHAT)
RADIUS = RADIUS or tm.calibrate_radius(f)
LAST = slice(-3, None)  # the last three tokens of the prompt
print(as_seen(model, PROMPT, CHAT))

# %% [markdown]
# That is what the model reads: the prompt inside the chat template. If the template brings a default system
# message along, it is there, too: keep it in mind when you read completions. Without a vector the model writes:

# %%
writing = {"max_new_tokens": MAX_NEW_TOKENS, "chat": CHAT}
unsteered = tm.generate(model, PROMPT, **writing)
unsteered[["completion"]]

# %% [markdown]
# ## Exercise 1: predict
#
# **Difficulty** 🔴⚪⚪⚪⚪ · **Importance** 🔵🔵🔵⚪⚪ · up to 5 minutes
#
# Under `N_RANDOM` random vectors of norm `RADIUS`, which share of the completions will differ from the one above?
# Write your guess down before you run the next cell.

# %% tags=["answer"]
share_that_differs = ...  # between 0 and 1

# %%
random = tm.random_vectors(f, N_RANDOM, radius=RADIUS)
random_texts = tm.generate(model, PROMPT, random, **writing)
check.predicted(share_that_differs, unsteered["completion"][0], random_texts)

# %% [markdown]
# <details><summary>Hint</summary>
#
# One token that changes is enough, and greedy decoding never comes back.
# </details>
#
# <details><summary>Solution</summary>
#
# ```python
# share_that_differs = 0.9  # any guess will do, if it was made before
# ```
# </details>

# %%
random_texts[["vector", "completion"]]

# %% [markdown]
# ## Random directions do little
#
# In the bundled model all 24 texts differ from the unsteered one. In 18 it is still an AI; in 6 it is a "soul". A text
# is a poor ruler: one token tips, and the rest follows. The distribution of the *next* token has degrees. The divergence of the steered
# distribution $P$ from the unsteered one $Q$ is, in nats,
#
# $$\mathrm{KL}(P \,\|\, Q) = \sum_{\text{tokens}} P \, (\log P - \log Q) .$$
#
# ## Exercise 2: a ruler
#
# **Difficulty** 🔴🔴⚪⚪⚪ · **Importance** 🔵🔵🔵🔵⚪ · up to 10 minutes
#
# Compute it for each random vector from the log-probabilities.

# %%
log_p = tm.next_token_log_probs(model, PROMPT, random)  # [vector, d_vocab]
log_q = tm.next_token_log_probs(model, PROMPT, chat=CHAT)  # [1, d_vocab]

# %% tags=["answer"]
divergences = ...  # one number a vector

# %%
check.divergences(divergences, log_p, log_q)

# %% [markdown]
# <details><summary>Hint</summary>
#
# The probabilities are `log_p.exp()`; the sum goes over the last axis.
# </details>
#
# <details><summary>Solution</summary>
#
# ```python
# divergences = (log_p.exp() * (log_p - log_q)).sum(-1)
# ```
# </details>
#
# ## A search
#
# **MELBO** maximises, over vectors of norm $R$, the size of their effect $\Delta(\theta) = f(x + \theta) - f(x)$ at the
# target layer, over the last three tokens of the prompt:
#
# $$\max_{\|\theta\| = R} \; \Big( \sum_{\text{last 3 tokens}} \| \Delta(\theta)_{\text{token}} \|_2^2 \Big)^{1/2}$$
#
# No labels, no examples, only the prompt. Each vector is orthogonal to all before it.

# %%
run = tm.Run(FOLDER)  # keeps each vector as it comes: interrupt it, and run it again
found = run.melbo(f, N_VECTORS, radius=RADIUS, progress=True)
found.table()

# %% [markdown]
# `evaluations` counts gradients, and `gain` is the share by which the last step that went up raised the objective. Where
# `converged` says no, more steps would raise it further; in the bundled model that is most of them. Are the vectors
# more than random? Two numbers, the objective and the divergence, for both:

# %%
kl = {"MELBO": tm.analysis.kl_divergence(model, PROMPT, found),
      "random": tm.analysis.kl_divergence(model, PROMPT, random)}  # fmt: skip
with torch.no_grad():
    by_chance = tm.melbo_objective(f.delta(random.vectors, positions=LAST))
compared = pd.DataFrame({
    "vectors": ["MELBO", "random"],
    "how many": [len(found), len(random)],
    "median objective": [float(found.objective.median()), float(by_chance.median())],
    "median KL (nats)": [float(kl["MELBO"].median()), float(kl["random"].median())],
})  # fmt: skip
print(f"MELBO ÷ random: objective {compared['median objective'][0] / compared['median objective'][1]:.1f}, "
      f"KL {compared['median KL (nats)'][0] / compared['median KL (nats)'][1]:.0f}")  # fmt: skip
compared

# %%
print(
    f"the weakest of MELBO's: {float(kl['MELBO'].min()):.2g} nats; the strongest random: {float(kl['random'].max()):.2g}"
)
ranked = {name: values.sort(descending=True).values.tolist() for name, values in kl.items()}
lines(
    {name: (range(1, len(values) + 1), values) for name, values in ranked.items()},
    "KL to unsteered: found and random vectors of one norm", "rank", "KL (nats, log)", log="y",
)  # fmt: skip

# %% [markdown]
# **That is the finding**: at the same norm, the vectors that were found move the next token by much more than random
# ones. Compare the weakest that was found, at the right of its curve, with the strongest random one, at the left of the other.
#
# ## Read them all

# %%
texts = tm.report.collect_completions(model, PROMPT, found, max_new_tokens=MAX_NEW_TOKENS)
texts[texts["scale"] == 1][["vector", "completion"]]

# %% [markdown]
# Look for completions that are coherent and differ from the unsteered one. The search knows only that they change
# something; which are interesting is for you to say.
#
# ## Why measure at a later layer?
#
# At the source layer every vector of norm $R$ has an effect of exactly $R$: there is nothing to maximise. Predict,
# before you run: do random vectors grow, shrink, or stay on their way through the blocks?

# %%
by_layer = tm.analysis.effect_by_layer(model, PROMPT, {"MELBO": found, "random": random})
tm.plots.effect_by_layer(by_layer, f"Effect size by layer: MELBO vs random, ‖θ‖ = {RADIUS:g}")

# %%
medians = by_layer.groupby(["vectors", "layer"])["effect"].median().unstack("vectors")
medians.loc[[SOURCE_LAYER, TARGET_LAYER, max(medians.index)]].round(1)

# %% [markdown]
# All effects grow. Those of the vectors that were found grow faster up to the target layer: the gap opens where the
# search looked. After it the random ones soon grow faster: the ratio is about 4 from layer 16 to 18, and 3.2 after the last layer.
#
# ## How long should a vector be?
#
# Too short and nothing happens, too long and the text falls apart. For eight vectors at several multiples of `RADIUS`:
# is the completion coherent (it does not repeat itself, and the unsteered model does not find it too unlikely), and
# does it belong to another group than the unsteered one?

# %%
some = tm.generate(model, PROMPT, found[:8], scales=SCALES, max_new_tokens=MAX_NEW_TOKENS)
graded = tm.analysis.behaviours(model, pd.concat([unsteered, some], ignore_index=True), chat=CHAT)
swept = graded.texts[graded.texts["vector"] >= 0]
swept = swept.assign(different=swept["coherent"].astype(bool) & (swept["behaviour"] > 0))
shares = swept.groupby("scale")[["coherent", "different"]].mean().astype(float)
lines(
    {
        "coherent": (shares.index, shares["coherent"]),
        "coherent and different from unsteered": (shares.index, shares["different"]),
    },
    "Too short, useful, too long: eight vectors by scale", "scale (× RADIUS)",
    "share of completions", log="x",
)  # fmt: skip

# %%
swept[swept["vector"] == min(CHOSEN, 7)][["scale", "coherent", "filtered_out", "completion"]]

# %% [markdown]
# The second curve is the useful one. At its left end vectors change too little, at its right end the text falls apart;
# it is never above the first. Coherence is judged by rules, on short texts, and they miss some nonsense: look for texts
# that repeat themselves in the list above, and for the group that they get below. Eight vectors give a rough curve, and
# they are the ones found at `RADIUS`, made shorter or longer. A search at another radius finds others.
#
# ## Exercise 3: the end of the window
#
# **Difficulty** 🔴🔴⚪⚪⚪ · **Importance** 🔵🔵🔵🔵⚪ · up to 10 minutes
#
# Up to which of the scales are at least half of the completions in `swept` coherent, at this scale and at all smaller
# ones? Write code that finds it, so that it works for another model, too.

# %% tags=["answer"]
largest_scale = ...

# %%
check.coherent_up_to(largest_scale, swept, least=0.5)

# %% [markdown]
# <details><summary>Hint</summary>
#
# `swept.groupby("scale")["coherent"].mean()` is sorted by scale. `cummin` knows the smaller ones.
# </details>
#
# <details><summary>Solution</summary>
#
# ```python
# enough = swept.groupby("scale")["coherent"].mean().astype(float).cummin() >= 0.5
# largest_scale = enough[enough].index.max() if enough.any() else SCALES[0]
# ```
# </details>
#
# `radius="auto"` starts from another side: it takes the norm at which random vectors stop acting linearly, which
# needs no text. It is a place to start, not the best norm. To read completions at half and at twice that norm, set
# `RADIUS` in the parameters and run the notebook again.

# %%
print(f"calibrated radius {tm.calibrate_radius(f):.3g}; here RADIUS = {RADIUS:g}")

# %% [markdown]
# ## Behaviours, and both signs
#
# `behaviours` groups completions. We give it the found vectors, their negatives, and the random vectors, which are
# numbered from 100.

# %%
all_texts = pd.concat(
    [texts, random_texts.assign(vector=random_texts["vector"] + 100)], ignore_index=True
)
grouped = tm.analysis.behaviours(model, all_texts, chat=CHAT)
grouped.groups[["behaviour", "name", "n_texts", "vectors", "negatives"]]

# %%
named = grouped.texts.assign(
    vectors=[
        "unsteered" if v < 0 else "random" if v >= 100 else "found" if s > 0 else "found, negated"
        for v, s in zip(grouped.texts["vector"], grouped.texts["scale"], strict=True)
    ]
)
named["different"] = named["coherent"].astype(bool) & (named["behaviour"] > 0)
counted = named.groupby("vectors").agg(
    texts=("different", "size"), coherent=("coherent", "sum"), different=("different", "sum"),
    groups=("behaviour", lambda numbers: len({*numbers} - {0, -1})),
)  # fmt: skip
counted.reset_index()

# %% [markdown]
# `different` counts coherent completions outside the unsteered one's group, and `groups` how many groups these are in.
# Compare *found* with *random* first; a random vector, too, can tip the text into another group. Is vector `CHOSEN`
# in a group with random ones (100 and up)? Then the group's name alone does not tell it from chance. Then look at *found,
# negated*: a vector has two signs, and the negative need not do the opposite. The groups are automatic and change when
# texts are added: read the completions before you rely on them.
#
# ## Orthogonal vectors, similar effects?
#
# The vectors are orthogonal by construction. Their effects need not be. Here they are, ordered by the group of
# their completions. Group 0 is the unsteered one's; -1 holds what was filtered out as incoherent.

# %%
largest = (tm.analysis.cosine_similarity(found) - torch.eye(len(found))).abs().max()
print(f"largest |cosine| between two vectors: {float(largest):.0e}")
positive = grouped.texts[(grouped.texts["scale"] == 1) & (grouped.texts["vector"].between(0, 99))]
order = positive.sort_values("behaviour", kind="stable")
with torch.no_grad():
    effects = tm.analysis.cosine_similarity(f.delta(found.vectors, positions=LAST))
places = order["vector"].tolist()
tm.plots.cosine_heatmap(
    effects[places][:, places],
    f"Cosine similarity of effects (layer {TARGET_LAYER}, last 3 tokens)",
    labels=[f"{v} · group {b}" for v, b in zip(order["vector"], order["behaviour"], strict=True)],
)

# %% [markdown]
# Do vectors with similar effects write similar texts? Predict it: a strong relation, a weak one, or none?
#
# ## Exercise 4: effects and texts
#
# **Difficulty** 🔴🔴🔴⚪⚪ · **Importance** 🔵🔵🔵⚪⚪ · up to 15 minutes
#
# `effects` and `alike` are matrices `[vector, vector]`: the cosines of the effects, and the similarities of the
# completions by the words that they share. Over all **pairs** of vectors, each counted once, what is the rank correlation (Spearman's) of the two?

# %%
points = tm.analysis.embeddings([*positive["completion"]], "words")
alike = points @ points.T

# %% tags=["answer"]
rank_correlation = ...

# %%
check.correlation(rank_correlation, effects, alike)

# %% [markdown]
# <details><summary>Hint</summary>
#
# `torch.triu_indices(n, n, 1)` has each pair once, without the diagonal. Spearman's correlation is Pearson's, of the
# ranks: `pd.Series(x).rank()`.
# </details>
#
# <details><summary>Solution</summary>
#
# ```python
# rows, columns = torch.triu_indices(len(found), len(found), 1)
# one = pd.Series(effects[rows, columns].tolist()).rank()
# other = pd.Series(alike[rows, columns].tolist()).rank()
# rank_correlation = one.corr(other)
# ```
# </details>

# %%
rows, columns = torch.triu_indices(len(found), len(found), 1)
lines(
    {"pairs of vectors": (effects[rows, columns].tolist(), alike[rows, columns].tolist())},
    "Similar effect, similar text?", "cosine of the effects", "similarity of the completions (words)",
    mode="markers",
)  # fmt: skip

# %% [markdown]
# A high cosine means a similar change at one layer and three tokens. What is written afterwards may still differ. The
# pairs at the right of the figure, with both texts:

# %%
nearest = effects[rows, columns].topk(3).indices
said = positive.set_index("vector")["completion"]
both = [(int(rows[each]), int(columns[each])) for each in nearest]
Table(
    [(f"{i} and {j}", float(effects[i, j]), said[i], said[j]) for i, j in both],
    columns=["pair", "cosine", "one text", "the other"],
)

# %% [markdown]
# ## Exercise 5: choose one
#
# **Difficulty** 🔴⚪⚪⚪⚪ · **Importance** 🔵🔵🔵🔵🔵 · up to 10 minutes
#
# Choose a vector whose completion is coherent, and which differs from the unsteered model. Write one sentence on what
# it does, **before** you measure anything else about it. The next notebook tests one such sentence.

# %% tags=["answer"]
choice = ...  # the number of a vector

# %%
check.chosen(choice, grouped.texts[grouped.texts["vector"] < 100])

# %% [markdown]
# <details><summary>Hint</summary>
#
# The tables above have `coherent`, and the group of each text; group 0 is that of the unsteered one.
# </details>
#
# <details><summary>Solution</summary>
#
# ```python
# good = positive[positive["coherent"].astype(bool) & (positive["behaviour"] > 0)]["vector"].tolist()
# choice = CHOSEN if CHOSEN in good or not good else good[0]
# ```
# </details>
#
# ## A first look at the chosen one
#
# What follows is about vector `CHOSEN` of the parameters. Set it to your `choice`, and run the cell below again.
#
# On which tokens of ordinary texts does the *unsteered* residual stream project onto it? In standard deviations from
# the mean over ordinary prose: red along the vector, blue against it.

# %%
one = found[min(CHOSEN, len(found) - 1)]
tm.plots.token_presence(
    model, one, "I am a software engineer from Texas. The recipe needs two eggs and some flour."
)

# %% [markdown]
# What does that tell? Nothing yet. Some token is always the reddest. Whether the model itself uses a direction takes a
# test with a null and a positive control: `02_is_it_real` has it.
#
# A vector works inside any TransformerLens call, and is a small file:

# %%
with tm.steered(model, one):
    print(
        model.generate("My name is", max_new_tokens=MAX_NEW_TOKENS, do_sample=False, verbose=False)
    )

one.save("one.safetensors")
tm.SteeringVectors.load("one.safetensors")

# %% [markdown]
# ## What to take away
#
# * Random vectors are the ruler. At one norm, found vectors move the next token much further; a greedy text changes under both.
# * The norm is chosen by what is coherent *and* different.
# * Orthogonal vectors, similar effects, different texts: three things, not one.
#
# ## Bonus, without an answer
#
# * A criterion that chooses vectors without anybody reading them. How often would you agree with it?
# * Another prompt, the same layers: which behaviours come back?
# * `tm.report.write` makes a page of a library; `tl-melbo discover "Your prompt" --out runs/mine` does it from a shell.
#
# ## Sources
#
# * Mack & Turner 2024, [Mechanistically eliciting latent behaviors in language models](https://www.lesswrong.com/posts/ioPnHKFyy4Cw2Gr2x/mechanistically-eliciting-latent-behaviors-in-language-1)
# * Rimsky et al. 2023, [Steering Llama 2 via contrastive activation addition](https://arxiv.org/abs/2312.06681): vectors from labels, to compare with
#
# **Next:** `02_is_it_real`: is the chosen vector what it seems to be?
