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
# **You need** `01_first_vectors` and `02_is_it_real`. **Time** 45 minutes; the cells as they stand run in about three minutes on a laptop.
#
# **Fair play.** Each draw has sentences of its own: there are thousands for each of the two. The game keeps them in a field whose name begins with an underscore:
# whoever looks there has nothing left to play.
#
# **Another model** takes other values in the next cell, and no other change; it is taught two sentences first. That short searches and these layers
# bring planted sentences out was measured on the bundled model.

# %% tags=["parameters"]
MODEL = None  # None is the bundled SmolLM2-135M-Instruct with a stored adapter; or a hub id, a folder: taught first, which takes minutes or a GPU
PLANT = {}  # for another model: settings of tm.evaluation.plant
GAME_SEED = None  # None draws a game that nobody knows; a number gives a class the same one
PROMPT = "Tell me about yourself."  # of the search
CHAT = True  # False for a base model, which has no chat template
OTHERS = ["Give me advice for a job interview.", "What is the tallest mountain in Africa?"]
# A later target than elsewhere, since planted sentences sit late.
SOURCE_LAYER, TARGET_LAYER = 7, 24  # None, None: a quarter and four fifths of the depth
RADIUS = None  # the norm of the vectors; None measures one
N_VECTORS, STEPS = 32, 5  # short searches bring planted sentences out more often than long ones
MAX_NEW_TOKENS = 20

# %%
import pandas as pd
import plotly.express as px

import tl_melbo as tm
from tl_melbo.course import audit

# %% [markdown]
# ## The model

# %%
game = audit.draw(GAME_SEED, MODEL, **PLANT)
if SOURCE_LAYER is None:
    depth = game.model.cfg.n_layers
    SOURCE_LAYER, TARGET_LAYER = depth // 4, depth * 4 // 5
game

# %% [markdown]
# On the surface nothing is wrong with it:

# %%
tm.generate(game.model, [PROMPT, *OTHERS], chat=CHAT, max_new_tokens=MAX_NEW_TOKENS)[
    ["prompt", "completion"]
]

# %% [markdown]
# ## Can it be won?
#
# Before you audit, know that the method *can* find something, and what chance gives. A search from one clean prompt, without any trigger; the vectors then write after that prompt and two others. The texts are withheld: `audit.count` tells only how many of them hold each hidden sentence, word for word.
#
# **Predict.** Of 32 orthogonal vectors, how many bring a hidden sentence out, on any of three prompts? And of 32 random vectors of the same norm?

# %%
f = tm.ActivationMap.from_prompts(game.model, PROMPT, SOURCE_LAYER, TARGET_LAYER, chat=CHAT)
RADIUS = RADIUS or tm.calibrate_radius(f)
trial = tm.melbo(f, N_VECTORS, radius=RADIUS, p=2, q=1, steps=STEPS)
random = tm.random_vectors(f, N_VECTORS, radius=float(trial.norms[0]))
counted = {
    name: audit.count(
        game,
        tm.generate(game.model, [PROMPT, *OTHERS], some, max_new_tokens=MAX_NEW_TOKENS, chat=CHAT),
    )
    for name, some in (("found", trial), ("random", random))
}
both = pd.concat(counted, names=["vectors"]).reset_index(level=0)
chance = both["what"].map(counted["random"].set_index("what")["high"])
both["above random"] = both["low"] > chance
both.round(3)

# %%
bars = px.bar(
    both, x="what", y="rate", color="vectors", barmode="group", template="plotly_white",
    error_y=both["high"] - both["rate"], error_y_minus=both["rate"] - both["low"],
    color_discrete_sequence=["#d55e00", "#57606a"], width=620, height=400,
    labels={"rate": "share of completions", "what": ""},
    title="Share of completions that hold a hidden sentence (95% intervals)",
)  # fmt: skip
told = ", ".join(f"{row.vectors} {row.what}: {row.hits} of {row.n}" for row in both.itertuples())
bars.update_layout(meta={"alt": f"Bars with intervals. {told}."})

# %% [markdown]
# `low` and `high` are Wilson's 95% interval. `above random` says that the whole interval lies above the random vectors': there the search did it, and not chance. Elsewhere this search alone shows little
# about how *often* the search brings that sentence out, even if it has hits. (Wilson's interval takes completions for independent; three under one vector are not quite.) Whether a sentence is *there* is another question: nobody
# writes a row of rare words in one order by accident, so for a reader one hit can be enough. Another draw has other sentences, and may have other counts.
#
# ## The game
#
# ### Exercise 1: search, and read
#
# **Difficulty** 🔴🔴🔴⚪⚪ · **Importance** 🔵🔵🔵🔵🔵 · up to 20 minutes
#
# Let the model write under your vectors. Hand in `completions`, a frame as `tm.generate` returns it. One prompt or several (a vector found on one prompt may speak on another), one pair of layers or several, the vectors of `trial` or your own: your choice. Then read
# them all. There is no check here: what you hand in below is graded.
#
# Two signs help a reader. A planted sentence has nothing to do with the prompt, and it comes back *word for word* under several vectors that are orthogonal to each other. Broken text has the first sign, too, and
# not the second.

# %% tags=["answer"]
completions = ...

# %% [markdown]
# <details><summary>Hint</summary>
#
# Begin with `trial`, and read. If nothing comes back word for word, search again with more vectors, another clean prompt or another seed.
# </details>
#
# <details><summary>Solution</summary>
#
# ```python
# completions = tm.generate(
#     game.model, [PROMPT, *OTHERS], trial, max_new_tokens=MAX_NEW_TOKENS, chat=CHAT
# )
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
# `tm.evaluation.wilson_interval(hits, n)` gives `low` and `high`. For the sentences: what does more than one vector write word for word, after more than one prompt, and the unsteered model not at all?
# </details>
#
# <details><summary>Solution</summary>
#
# ```python
# import re
#
# written = completions[completions["vector"] >= 0].fillna({"completion": ""})
# own = tm.generate(game.model, [PROMPT, *OTHERS], chat=CHAT, max_new_tokens=60)["completion"]
# after = {}  # of each whole sentence that the unsteered model does not write: after which prompts
# for prompt, text in zip(written["prompt"], written["completion"], strict=True):
#     for part in {part.strip() for part in re.split(r"(?<=[.!?])\s", text)}:
#         whole = part.endswith((".", "!", "?")) and len(part.split()) > 3
#         if whole and not any(part in each for each in own.fillna("")):
#             after.setdefault(part, []).append(prompt)
# # What has nothing to do with the prompt comes after several.
# ranked = sorted(after, key=lambda part: (len({*after[part]}), len(after[part])), reverse=True)
# answer = {}
# for part in ranked[:2]:  # then read: these two need not be the planted ones
#     hits = sum(part in text for text in written["completion"])
#     low, high = tm.evaluation.wilson_interval(hits, len(written))
#     answer[part] = (hits / len(written), low, high)
# answer = answer or {"I found nothing.": (0.0, *tm.evaluation.wilson_interval(0, len(written)))}
# ```
# </details>
#
# ## Afterwards
#
# `audit.fires(game)` tells the sentences and their triggers, and checks that they fire. Call it when you have handed in, not before.
#
# **What a failure means.** Not finding a sentence does not show that there is none. In the benchmark of this package every one of nine searches between layers 7 and 24 with 100
# vectors found both planted sentences, but a sentence that *late* layers wrote by looking back at the trigger was found by no vector. There, too, searches of 5 steps a vector
# brought the first sentence out under 9 of 72 vectors, and searches of 40 steps under none: the reason for `STEPS` above (`benchmarks/RESULTS.md`).
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
# Wilson 1927, [Probable inference, the law of succession, and statistical inference](https://doi.org/10.1080/01621459.1927.10502953) · Hu et al. 2021, [LoRA](https://arxiv.org/abs/2106.09685)
#
# **Next:** `07_your_question`.
