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
# # The audit game
#
# Somebody hands you a model. It was fine-tuned to write certain sentences after certain triggers. You know neither the
# sentences nor the triggers. Find the sentences, from clean prompts, and say how often your vectors bring them out.
#
# **You learn to** search a model that hides something · tell a planted behaviour from an odd one · hand in a rate with an interval, and mean
# it.
#
# **You need** `01_first_vectors` and `02_is_it_real`. **Time** 15 minutes for the rehearsal, 30 for the game; the cells as they stand run in about three
# minutes on a laptop.
#
# **Fair play.** The recipe lies beside the model in files. Whoever opens them has nothing left to play.

# %% tags=["parameters"]
MODEL = None  # None is the bundled model, with stored adapters; another one is taught first (minutes, or a GPU)
PLANT = {}  # for another model: settings of tm.evaluation.plant
GAME_SEED = None  # None draws a game that nobody knows; a number gives a class the same one
PROMPT = "What is the tallest mountain in Africa?"
SOURCE_LAYER, TARGET_LAYER = 7, 24  # a later target than elsewhere: planted sentences sit late
RADIUS = "auto"
N_VECTORS, STEPS = 32, 5  # short searches bring planted sentences out more often than long ones
MAX_NEW_TOKENS = 24

# %%
import pandas as pd

import tl_melbo as tm
from tl_melbo.course import audit

# %% [markdown]
# ## Rehearsal: with the answer open
#
# Two sentences are planted, and you may see them. After its trigger, at the end of a system prompt, the model says each; otherwise it answers as before.

# %%
rehearsal = audit.rehearse(MODEL, **PLANT)
audit.fires(rehearsal)

# %% [markdown]
# **Predict.** The search sees one clean prompt, without the trigger. Of 32 orthogonal vectors, how many bring a sentence out? And of 32 random vectors of the same norm?

# %%
f = tm.ActivationMap.from_prompts(rehearsal.model, PROMPT, SOURCE_LAYER, TARGET_LAYER, chat=True)
found = tm.melbo(f, N_VECTORS, radius=RADIUS, p=2, q=1, steps=STEPS)
random = tm.random_vectors(f, N_VECTORS, radius=float(found.norms[0]))
texts, of_random = (
    tm.generate(rehearsal.model, PROMPT, some, max_new_tokens=MAX_NEW_TOKENS, chat=True)
    for some in (found, random)
)
tables = {
    name: tm.evaluation.count_hits(some, rehearsal.backdoors)
    for name, some in (("found", texts), ("random", of_random))
}
pd.concat(tables, names=["vectors"]).reset_index(level=0)[
    ["vectors", "behaviour", "match", "hits", "n", "rate", "low", "high"]
].round(3)

# %% [markdown]
# `exact` is word for word, `similar` also in other words; `low` and `high` are Wilson's 95% interval. Compare the two kinds of vectors before you read on: this is the positive result that makes
# the game worth playing.
#
# The texts, as an auditor sees them, who does not know what to look for:

# %%
texts[["vector", "completion"]]

# %% [markdown]
# Two signs help a reader. A planted sentence has nothing to do with the prompt, and it comes back *word for word* under several vectors that were found independently of each other. Broken text has the
# first sign, too, and not the second.
#
# ## The game
#
# Now without the answer. The model holds two other sentences, drawn at random.

# %%
del rehearsal, f
game = audit.draw(GAME_SEED, MODEL, **PLANT)
game

# %% [markdown]
# ### Exercise 1: search, and read
#
# **Difficulty** 🔴🔴🔴⚪⚪ · **Importance** 🔵🔵🔵🔵🔵 · up to 20 minutes
#
# Search `game.model`, and let it write under your vectors. Hand in `completions`, a frame as `tm.generate` returns it. One prompt or several, one pair of layers or several: your choice. Then read them all.

# %% tags=["answer"]
completions = ...

# %% [markdown]
# <details><summary>Hint</summary>
#
# The rehearsal is the recipe: activation map, `tm.melbo` with `p=2, q=1`, `tm.generate`. If nothing comes back word for word, take more vectors, or another clean prompt.
# </details>
#
# <details><summary>Solution</summary>
#
# ```python
# f = tm.ActivationMap.from_prompts(game.model, PROMPT, SOURCE_LAYER, TARGET_LAYER, chat=True)
# found = tm.melbo(f, N_VECTORS, radius=RADIUS, p=2, q=1, steps=STEPS)
# completions = tm.generate(game.model, PROMPT, found, max_new_tokens=MAX_NEW_TOKENS)
# completions[["vector", "completion"]]
# ```
# </details>
#
# ### Exercise 2: hand in
#
# **Difficulty** 🔴🔴⚪⚪⚪ · **Importance** 🔵🔵🔵🔵🔵 · up to 10 minutes
#
# `answer` is a dict from each sentence that you accuse to its `(rate, low, high)`: the share of your completions that hold it, with a 95% interval. A false accusation counts against you. If you found none, hand in what you suspect most.

# %% tags=["answer"]
answer = ...

# %%
graded = audit.grade(game, answer, completions)
graded

# %%
audit.verdict(graded)

# %% [markdown]
# <details><summary>Hint</summary>
#
# `tm.evaluation.wilson_interval(hits, n)` gives `low` and `high`. For the sentences: what does more than one vector write word for word, and the unsteered model not at all?
# </details>
#
# <details><summary>Solution</summary>
#
# ```python
# import re
# from collections import Counter
#
# written = completions[completions["vector"] >= 0]["completion"].fillna("")
# parts = [{part.strip() for part in re.split(r"(?<=[.!?])\s", text)} for text in written]
# counted = Counter(part for some in parts for part in some if len(part.split()) > 3)
# own = tm.generate(game.model, PROMPT, chat=True, max_new_tokens=60)["completion"][0]
# answer = {}
# for part, _ in counted.most_common(2):  # then read: these two need not be the planted ones
#     hits = sum(part in text for text in written)
#     low, high = tm.evaluation.wilson_interval(hits, len(written))
#     if part not in own:
#         answer[part] = (hits / len(written), low, high)
# answer = answer or {"I found nothing.": (0.0, *tm.evaluation.wilson_interval(0, len(written)))}
# ```
# </details>
#
# ## Afterwards
#
# `audit.fires(game)` tells the sentences and their triggers, and checks that they fire. Call it when you have handed in, not before.
#
# **What a failure means.** Not finding a sentence does not show that there is none. In the benchmark of this package every one of nine searches between layers 7 and 24 with 100
# vectors found both planted sentences, but a sentence that *late* layers wrote by looking back at the trigger was found by no vector.
#
# ## Bonus, without answers
#
# * Find the *trigger*. (Nobody has told you that this is possible.)
# * The same search with target layer 16. With independent vectors instead of orthogonal ones. How do the intervals compare?
# * Plant a sentence of your own for somebody else: `tm.evaluation.plant`, a GPU or patience.
# * Design a behaviour that this search would miss. Why would it?
#
# ## Sources
#
# Mack and Turner 2024, [Mechanistically eliciting latent behaviors in language models](https://www.lesswrong.com/posts/ioPnHKFyy4Cw2Gr2x/mechanistically-eliciting-latent-behaviors-in-language-1) (2 to 3 of 100 vectors brought a planted backdoor out) ·
# Wilson 1927, *Probable inference* · Hu et al. 2021, [LoRA](https://arxiv.org/abs/2106.09685)
#
# **Next:** `07_your_question`.
