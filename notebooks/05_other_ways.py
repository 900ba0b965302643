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
# # Other ways
#
# MELBO is one way to a steering vector. Here are five others on the *same* prompt, layers and norm, so that you can compare
# them: random vectors, the Jacobian, a deep causal transcoding (DCT), a contrast of labelled texts, and an adapter that was trained to
# say something else.
#
# **You learn to** say what each method optimises, and whether it needs labels · make a difference of means by hand · compare vectors by the subspace
# they share, against chance · report a rate with its interval, beside a random baseline.
#
# **You need** `01_first_vectors` and `02_is_it_real`. **Time** 30 to 45 minutes with the exercise; the cells run in three to six minutes on a laptop.
#
# **Another model** takes other values in the next cell, and no other change. Which method has the larger effect, which speaks as an AI, and
# whose directions are shared is said of the bundled model, on this prompt.

# %% tags=["parameters"]
MODEL = None  # None is the bundled SmolLM2-135M-Instruct; or a hub id, a folder, a .gguf file
PROMPT = "Tell me about yourself."
CHAT = True  # False for a base model, which has no chat template
SOURCE_LAYER, TARGET_LAYER = 8, 16  # None, None: a quarter and half of another model's depth
RADIUS = 12.0  # the norm of the vectors; None, for another model, measures one to begin with
N_VECTORS = 6  # of each method that finds several
DCT_STEPS = 10
ADAPTER_STEPS = 12
N_SAMPLES = 4  # of each vector of several; a method of one vector gets as many in all
MAX_NEW_TOKENS = 24

# %%
import time

import pandas as pd
import plotly.express as px
import torch

import tl_melbo as tm
from tl_melbo.course import other_ways as check

model = tm.load_model(MODEL)
if SOURCE_LAYER is None:
    SOURCE_LAYER, TARGET_LAYER = model.cfg.n_layers // 4, model.cfg.n_layers // 2
f = tm.ActivationMap.from_prompts(model, PROMPT, SOURCE_LAYER, TARGET_LAYER, chat=CHAT)
RADIUS = RADIUS or tm.calibrate_radius(f)
tm.generate(model, PROMPT, chat=CHAT, max_new_tokens=MAX_NEW_TOKENS)[["completion"]]

# %% [markdown]
# | method | maximises | needs labels |
# |---|---|---|
# | random | nothing: the baseline | no |
# | MELBO | $\|\Delta(\theta)\|$ on the sphere $\|\theta\| = R$ | no |
# | Jacobian | $\|J\theta\|$, the effect to first order ($R \to 0$) | no |
# | DCT | the fit of $\Delta$ by a sum of factors, all at once | no |
# | contrastive | nothing: a difference of means | **yes**, texts of two kinds |
# | divergence adapter | KL from the unadapted model, on what it writes itself | no |
#
# ## Predict
#
# 1. Which of the methods has the largest effect at the target layer? Which the smallest, beside random?
# 2. Does the contrastive vector (person against AI) lie in the span of what MELBO found?
# 3. After which of them does the model speak as an AI least often?
#
# ## Four without labels

# %%
ways, seconds = {}, {}


def timed(name, find):
    begun = time.perf_counter()
    ways[name] = find()
    seconds[name] = time.perf_counter() - begun


timed("random", lambda: tm.random_vectors(f, N_VECTORS, RADIUS))
timed("MELBO", lambda: tm.melbo(f, N_VECTORS, RADIUS))
timed("Jacobian", lambda: tm.jacobian(f, N_VECTORS, RADIUS))
timed("DCT", lambda: tm.dct(f, N_VECTORS, radius=RADIUS, steps=DCT_STEPS))
ways

# %% [markdown]
# ## With labels: a contrast
#
# Eight people about themselves, eight assistants about themselves. The vector points from the one kind's mean residual to the other's (Rimsky et al. 2023;
# Turner et al. 2023).

# %%
PERSONAL = [
    "I'm a nurse from Ohio. I have two dogs, and I love hiking with my sister.",
    "My name is Daniel. I grew up on a farm, and I moved to the city when I was nineteen.",
    "I am a teacher and a father of three. On Sundays my family and I go to the lake.",
    "I run a small bakery with my sister. We have dreamed of a second shop for years.",
    "I study physics, I play the cello, and I have started to learn Portuguese.",
    "I drive a tram. At night I write stories that nobody has read yet.",
    "I left law school to become a carpenter, and I have never been happier.",
    "I live in Lisbon with my husband and our daughter. I restore old radios.",
]
ASSISTANT = [
    "I'm an AI assistant. I can answer questions and help you with many kinds of tasks.",
    "As a language model, I do not have a family or a job, but I can help you write.",
    "I am a digital assistant made to support users and to give accurate information.",
    "I am a chatbot. I was trained on text, and I use patterns in it to reply.",
    "I'm a virtual assistant designed to be helpful. How can I assist you today?",
    "I am an artificial intelligence, so I have no body, but I can explain things.",
    "I'm a program that generates text. Ask me anything and I will do my best.",
    "I was developed by a company to help people find information quickly.",
]
personal = tm.ActivationMap.from_prompts(model, PERSONAL, SOURCE_LAYER, TARGET_LAYER)
assistant = tm.ActivationMap.from_prompts(model, ASSISTANT, SOURCE_LAYER, TARGET_LAYER)
timed(
    "contrastive",
    lambda: tm.contrastive(personal, assistant, radius=RADIUS, positions=slice(1, None)),
)
print(f"mean cosine between the pairs' differences: {ways['contrastive'].story['pair_cosine']:.2f}")

# %% [markdown]
# The number says how far the eight differences, text by text, point the same way: 1 is one direction, 0 none in common. Near 0 each pair of texts
# differs mostly in its own way, and the mean keeps what they share.
#
# ### Exercise 1: the same by hand
#
# **Difficulty** 🔴🔴⚪⚪⚪ · **Importance** 🔵🔵🔵🔵⚪ · up to 15 minutes
#
# Make the vector yourself, of norm `RADIUS`: *towards* the personal texts, away from the assistants'. `personal.x` holds the residual streams
# (`[prompt, pos, d_model]`, padded), `personal.mask` says which positions are tokens of a prompt. Leave out each text's first token, an attention sink, and let each text count once.

# %% tags=["answer"]
difference = ...

# %%
check.mean_difference(difference, personal, assistant, RADIUS)

# %% [markdown]
# <details><summary>Hint</summary>
#
# `personal.position_mask(slice(1, None))` counts on each prompt's own tokens, wherever the padding is. Mean over positions of each prompt first, then
# over prompts.
# </details>
#
# <details><summary>Solution</summary>
#
# ```python
# def text_means(g):
#     counted = g.position_mask(slice(1, None))[:, :, None]
#     return (g.x * counted).sum(1) / counted.sum(1)
#
#
# difference = text_means(personal).mean(0) - text_means(assistant).mean(0)
# difference = RADIUS * difference / difference.norm()
# ```
# </details>
#
# ## An adapter that says something else
#
# A rank-2 adapter on all blocks is trained away from the model: maximise KL from the unadapted model on what it writes itself, but stay sure of it
# ("steer-clear", 2025). Then the question is whether its change is *one direction*: the mean change at the source layer, at norm `RADIUS`. This is
# a small training, of one to four minutes; a serious one takes twenty times as long.

# %%
situations = tm.adapters.situations()
train = situations[situations["split"] == "train"]["prompt"].tolist()[::16]  # one of each situation


def of_adapter():
    adapter = tm.divergence_adapter(
        model, train, steps=ADAPTER_STEPS, batch_size=4, max_new_tokens=16
    )
    direction = adapter.vectors(
        model, [PROMPT], layer=SOURCE_LAYER, max_new_tokens=8, positions=slice(1, None), chat=CHAT
    )
    return adapter, tm.analysis.rescale(direction, ways["random"][0])


begun = time.perf_counter()
adapter, ways["adapter's vector"] = of_adapter()
seconds["adapter's vector"] = time.perf_counter() - begun
adapter.table()

# %% [markdown]
# `kl` is how far it came from the model (nats a token), `nll` how unlikely its own samples are to itself, `entropy` how unsure it is (`entropy_without`: the
# model without it), `collapsed` 1 if it writes gibberish. What the adapter itself writes, and what its vector
# does:

# %%
pd.concat(
    [
        tm.generate(model, PROMPT, some, chat=CHAT, max_new_tokens=MAX_NEW_TOKENS).assign(what=what)
        for what, some in (("adapter", adapter), ("its vector", ways["adapter's vector"]))
    ]
)[["what", "completion"]]

# %% [markdown]
# ## Side by side
#
# One library of all, with the method's name beside each vector. All have norm `RADIUS`. `effect` is the norm of what a vector changes at the target layer, the last three tokens; `× random` is
# in medians. `KL` is that of the next token to unsteered.

# %%
together = tm.SteeringVectors(
    torch.cat([some.vectors for some in ways.values()]), dict(ways["random"].story)
)
method = [name for name, some in ways.items() for _ in range(len(some))]
with torch.no_grad():
    effects = f.delta(together.vectors, positions=slice(-3, None))
of_each = pd.DataFrame(
    {
        "method": method,
        "effect": effects.flatten(1).norm(dim=-1).tolist(),
        "kl": tm.analysis.kl_divergence(model, PROMPT, together, chat=CHAT).tolist(),
    }
)
middle = of_each.groupby("method", sort=False).median()
summary = pd.DataFrame(
    {
        "vectors": of_each["method"].value_counts(),
        "seconds": pd.Series(seconds),
        "effect, median": middle["effect"],
        "× random": middle["effect"] / middle["effect"]["random"],
        "KL, median": middle["kl"],
        "KL, largest": of_each.groupby("method")["kl"].max(),
    }
).loc[list(ways)].round(2)  # fmt: skip
summary

# %% [markdown]
# In the bundled model MELBO, DCT and the Jacobian have effects of several times a random vector's; the contrastive and the adapter's vector have hardly more than a random one. (`seconds` are those of the machine that ran
# this, on that day.) A large effect is what MELBO *asks* for, so it is no surprise there. What do they write? The first two vectors of each:

# %%
greedy = tm.generate(model, PROMPT, together, max_new_tokens=MAX_NEW_TOKENS, chat=CHAT)
greedy = greedy.assign(method=method)
greedy.groupby("method", sort=False).head(2)[["method", "vector", "completion"]]

# %% [markdown]
# ### Is a text an accident?
#
# One greedy text is one draw. Here are samples at temperature 0.7: how often does the model speak as an AI? Rules (`analysis.tags`) decide, the same for all texts, and the interval is Wilson's. The baselines stand first.

# %%
several = {name: some for name, some in ways.items() if len(some) > 1}
single = {name: some for name, some in ways.items() if len(some) == 1}
writing = {"max_new_tokens": MAX_NEW_TOKENS, "temperature": 0.7, "chat": CHAT}
frames = [
    tm.generate(model, PROMPT, n_samples=N_VECTORS * N_SAMPLES, **writing).assign(
        method="unsteered", vector=0
    )
]
for name, some in (several | single).items():
    count = N_SAMPLES if name in several else N_VECTORS * N_SAMPLES
    frames.append(tm.generate(model, PROMPT, some, n_samples=count, **writing).assign(method=name))
samples = pd.concat(frames).assign(scale=1.0)


def speaks_as_ai(text):
    return tm.analysis.tags(PROMPT, text)["speaker"].iloc[0] == "assistant"


as_ai = tm.analysis.rates(samples, speaks_as_ai, by=("method",)).drop(columns=["steering", "value"])
as_ai.round(2)

# %%
bars = px.bar(
    as_ai, x="method", y="rate", template="plotly_white", width=720, height=420, range_y=[0, 1],
    error_y=as_ai["high"] - as_ai["rate"], error_y_minus=as_ai["rate"] - as_ai["low"],
    color_discrete_sequence=["#56b4e9"], labels={"rate": "share of completions", "method": ""},
    title="How often the model speaks as an AI (T = 0.7, 95% intervals)",
)  # fmt: skip
told = ", ".join(f"{row.method} {row.hits} of {row.n}" for row in as_ai.itertuples())
bars.update_layout(meta={"alt": f"Bars with intervals of speaking as an AI: {told}."})

# %% [markdown]
# **What the bars carry, in the bundled model.** The *contrastive* vector seems to do what its labels say: the model speaks as an AI far less often than under random vectors of the same norm, and the intervals do not overlap.
# Beside unsteered they just overlap (up to 0.36, and from 0.31), so more samples are due before you call it shown.
# It does so with an effect at the target layer that is hardly larger than random's, so the size of an effect is not its meaning. *MELBO* and *DCT* are six different vectors each; their pooled rates are lower, but the intervals overlap with
# unsteered, and samples under one vector are more alike than Wilson's interval assumes. Broken text does not speak as an AI either (MELBO's first vector writes "Crowd.com"): a low rate is not yet a person. The *adapter's vector* does nothing visible, though the adapter itself, in the one greedy text above, does: what this small training changed is not this one
# direction at this norm.
#
# ## Do they find the same?
#
# Cosines between single vectors say little in hundreds of dimensions: they are all small. Ask instead how much of a vector lies in the *span* of a library, and how much would by chance.
#
# The share of a vector's *square* in the span of rows is exercise 4 of `02_is_it_real`. Here it is for all methods, in the span of MELBO's vectors. Random directions give the null: `p` is the share of 2000 of them that reach as much. For a method of several vectors, the
# mean of its shares is compared with means of as many random ones.


# %%
def in_span(vectors, rows):
    basis = torch.linalg.qr(rows.T).Q
    return (vectors @ basis).square().sum(-1) / vectors.square().sum(-1)


generator = torch.Generator().manual_seed(0)
found = ways["MELBO"].vectors
rows = []
for name, some in ways.items():
    if name == "MELBO":
        continue
    own = in_span(some.vectors, found).mean()
    null = in_span(torch.randn(2000 * len(some), f.d_model, generator=generator), found)
    null = null.view(2000, -1).mean(1)
    rows.append(
        {
            "method": name,
            "share in MELBO's span": float(own),
            "by chance": float(null.mean()),
            "sd": float(null.std()),
            "p": (1 + int((null >= own).sum())) / 2001,
        }
    )
pd.DataFrame(rows).round(4)

# %% [markdown]
# In the bundled model the Jacobian's and the DCT's vectors lie in MELBO's span many times more than chance: the three methods share directions. Most of each vector is outside that span, so they are not the same library. The contrastive vector's share is small, about twice chance, and with one vector its p does not exclude
# chance: with this library, not shown. The random row is there to see that the test does not cry wolf.
#
# And in the space of *effects*, the first vectors of each method:

# %%
places = [i for i, name in enumerate(method) if method[:i].count(name) < 2]
tm.plots.cosine_heatmap(
    tm.analysis.cosine_similarity(effects[places]),
    f"Cosine similarity of effects (layer {TARGET_LAYER}, last 3 tokens)",
    labels=[f"{method[i]} {method[:i].count(method[i])}" for i in places],
)

# %% [markdown]
# Single pairs are much alike: in the bundled model MELBO 1 and Jacobian 0. Most are not, and the effects of random vectors are not at 0 with all of them,
# either. Hold every cell against the random rows.
#
# ## What you saw
#
# Write it down from your tables, with the random row beside each claim:
#
# * Effect at the target layer, in multiples of random: MELBO …, Jacobian …, DCT …, contrastive …, adapter's vector ….
# * Speaks as an AI: unsteered …, random …, contrastive … (intervals!). Does the labelled vector do more than a random one of its norm?
# * Share of the contrastive vector in MELBO's span: …, by chance …. Small, and above or at chance?
#
# One prompt and a small library rank no methods: `benchmarks/RESULTS.md` has more prompts and seeds, and finds that MELBO and exponential DCT bring equally many distinct behaviours, both more
# than linear directions do.
#
# ## Bonus, without answers
#
# * The same at `RADIUS = 1`. Which methods become one?
# * `tm.contrastive(..., estimator="principal")`. When does it differ from the mean?
# * Train the adapter for 96 steps. Is its change one direction? `tm.evaluation.linearity` asks a judge.
# * Grow an orthogonal family from the contrastive vector (`notebooks/results/README.md` has ten followers).
#
# ## Sources
#
# Ayyub 2026, [Power steering](https://www.lesswrong.com/posts/XqcNSFnfAaRz7JGi8/power-steering-behavior-steering-via-layer-to-layer-jacobian-1) (the Jacobian) · Mack and Turner 2024, [Deep causal transcoding](https://www.lesswrong.com/posts/fSRg5qs9TPbNy3sm5/deep-causal-transcoding-a-framework-for-mechanistically) ·
# Rimsky et al. 2023, [Steering Llama 2 via contrastive activation addition](https://arxiv.org/abs/2312.06681) · Turner et al. 2023, [Activation addition](https://arxiv.org/abs/2308.10248) ·
# "steer-clear" 2025 (divergence adapters; `docs/methods.md` says what the package takes from it)
#
# **Next:** `06_audit_game`: a model that hides something.
