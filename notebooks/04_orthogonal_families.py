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
# # Orthogonal families
#
# Vector 20 of the library makes the model's greedy text a philosopher's: no self, one question. Is *that* the direction of philosophy?
# Call it **θ₀**. **MELBO-ortho** asks for another vector with the same effect, orthogonal to θ₀; then for another, orthogonal to
# both; and so on until nothing is left. Each of them is a *follower* of θ₀, and all together are its *family*.
# Jacob G-W found more than 800 that all make Qwen1.5-1.8B-Chat write code.
#
# **You learn to** find a follower yourself · read a family's curves beside their baselines · notice when two measures
# disagree, or when one is blind · run a test that could have come out the other way (a positive control).
#
# **You need** `01_first_vectors`. **Time** 45 minutes with the exercise; the cells run in about two minutes on a laptop.
#
# Two families run through it. The philosopher's (vector 20) leads. The person's (vector 4, "I'm a 25-year-old software
# engineer") shows how a measure goes blind. A few vectors are found live. Both whole families were computed
# before (`make results`); their tables are in `results/`.
#
# **Another model** takes other values in the next cell, and no other change. It then has its own θ₀, and the live cells are about that one.
# The philosopher, the person, their whole families and their sums stay those of the bundled model, at norm 12.

# %% tags=["parameters"]
MODEL = None  # None is the bundled SmolLM2-135M-Instruct; or a hub id, a folder, a .gguf file
PROMPT = "Tell me about yourself."
CHAT = True  # False for a base model, which has no chat template
SOURCE_LAYER, TARGET_LAYER = 8, 16  # None, None: a quarter and half of another model's depth
RADIUS = 12.0  # the norm of the vectors; None, for another model, measures one to begin with
THETA0 = 20  # which vector of the library the family grows from: read their texts, and choose
N_FAMILY = 3
MAX_NEW_TOKENS = 24

# %%
import pandas as pd
import plotly.express as px
import torch

import tl_melbo as tm
from tl_melbo.course import families as check
from tl_melbo.tables import Table

model = tm.load_model(MODEL)
if SOURCE_LAYER is None:
    SOURCE_LAYER, TARGET_LAYER = model.cfg.n_layers // 4, model.cfg.n_layers // 2
f = tm.ActivationMap.from_prompts(model, PROMPT, SOURCE_LAYER, TARGET_LAYER, chat=CHAT)
RADIUS = RADIUS or tm.calibrate_radius(f)
theta0 = tm.melbo(f, THETA0 + 1, radius=RADIUS)[THETA0]
tm.generate(model, PROMPT, theta0, scales=[0, 1], max_new_tokens=MAX_NEW_TOKENS)[
    ["scale", "completion"]
]

# %% [markdown]
# ## Predict
#
# 1. How many orthogonal vectors have the philosopher's effect: none, ten, hundreds? The bundled model's space has 576 dimensions.
# 2. Are they as long as θ₀, shorter, or longer?
# 3. If two vectors do the same, what does their mean do?
#
# ## A follower, by hand
#
# With $z(\theta)$ the mean over tokens of what arrives at the target layer, vector $k$ solves
#
# $$\min_{\theta_k} \| z(\theta_k) - z(\theta_0) \| \quad \text{with} \quad
# \theta_k \perp \theta_0, \theta_1, \dots, \theta_{k-1} .$$
#
# ### Exercise 1: one follower with Adam
#
# **Difficulty** 🔴🔴🔴⚪⚪ · **Importance** 🔵🔵🔵🔵🔵 · up to 20 minutes
#
# Write a search for one vector, orthogonal to θ₀. Its effect may be at most half as far from θ₀'s as the unsteered model is
# (where the package's own search leaves more than that: at most 1.25 times what it leaves, and never over 90%).
# Write the loop yourself, with `torch.optim.Adam`. About 60 steps are enough; the published search takes 1000
# smaller ones. `effect` is a function like `mean_effect`: the check gives a simple one that it made, and then the real one.


# %%
def mean_effect(vectors):
    """What each vector changes at the target layer, the mean over tokens, [vector, d_model]."""
    return f.delta(vectors).mean((1, 2))


with torch.no_grad():
    print("distance, unsteered:", round(mean_effect(theta0.vectors).norm().item(), 2))


# %% tags=["answer"]
def follower(effect, start):
    """A vector [d_model], orthogonal to start, with nearly the effect of start."""
    return ...


# %%
check.follower(follower, f, theta0)

# %% [markdown]
# <details><summary>Hint</summary>
#
# Let Adam move a free tensor, and project *inside* the loss: subtract its part along θ₀, and give the rest to `effect`. Start at
# zero. Learning rate: a fortieth of θ₀'s norm. Project once more at the end.
# </details>
#
# <details><summary>Solution</summary>
#
# ```python
# def follower(effect, start):
#     unit = start / start.norm()
#     with torch.no_grad():
#         wanted = effect(start[None])
#
#     theta = torch.zeros_like(start, requires_grad=True)
#     optimiser = torch.optim.Adam([theta], lr=float(start.norm()) / 40)
#     for step in range(60):
#         orthogonal = theta - (theta @ unit) * unit
#         loss = (effect(orthogonal[None]) - wanted).norm()
#         optimiser.zero_grad()
#         loss.backward()
#         optimiser.step()
#
#     return theta.detach() - (theta.detach() @ unit) * unit
# ```
# </details>
#
# ## The same, by the package
#
# `tm.melbo_ortho` uses a quasi-Newton method: 40 gradients a vector. `stopped` says that it used them all: these are
# good vectors, not the best ones.

# %%
family = tm.melbo_ortho(f, theta0, N_FAMILY)
family.table()

# %%
measured = tm.analysis.family(model, f, family, theta0, max_new_tokens=MAX_NEW_TOKENS)
measured[["kind", "index", "norm", "distance", "kl_to_reference", "completion"]]

# %% [markdown]
# Read it row by row. `family` is what was found. `rescaled` is the same at θ₀'s norm. `random` vectors have the *family's* norms, several
# times θ₀'s. `distance` is to θ₀'s effect: small is near.
#
# The baselines write, too. Beside texts under random vectors of the family's norm, one can say what is
# the family's doing. A text counts as *θ₀'s kind* if a sentence embedder puts it nearer to θ₀'s text than to the unsteered one.

# %%
long_random = tm.random_vectors(f, 8, radius=float(family.norms.mean()))
short = tm.analysis.rescale(family, theta0)
written = {
    "family": family,
    "family at θ₀'s norm": short,
    "random at the family's norm": long_random,
}
texts = {
    name: tm.generate(model, PROMPT, some, max_new_tokens=MAX_NEW_TOKENS)
    for name, some in written.items()
}
kinds = measured.set_index("kind")["completion"]


def share_like(texts, like, unlike):
    """How many texts are nearer to one text than to another, with Wilson's interval."""
    points = tm.analysis.embeddings([like, unlike, *texts], "sentences")
    hits = int((points[2:] @ points[0] > points[2:] @ points[1]).sum())
    low, high = tm.evaluation.wilson_interval(hits, len(texts))
    return {"of θ₀'s kind": hits, "n": len(texts), "share": hits / len(texts), "low": low,
            "high": high}  # fmt: skip


pd.DataFrame(
    [
        {
            "vectors": name,
            **share_like([*some["completion"]], kinds["reference"], kinds["unsteered"]),
        }
        for name, some in texts.items()
    ]
).round(2)

# %%
texts["random at the family's norm"][["vector", "completion"]]

# %% [markdown]
# A handful of vectors makes wide intervals: look at `low` and `high` before you believe a difference. Only the whole family, below,
# can carry a claim.
#
# ### Are they the same direction?
#
# No, by construction. Their *effects* are another matter. Row θ₀ is the original; the last rows are random vectors of
# the family's norm.

# %%
rows = torch.cat([theta0.vectors, family.vectors, long_random.vectors[:2]])
with torch.no_grad():
    effects = f.delta(rows, positions=slice(1, None))
labels = ["θ₀", *range(len(family)), "random", "random'"]
tm.plots.cosine_heatmap(
    tm.analysis.cosine_similarity(effects),
    f"Cosine similarity of effects (layer {TARGET_LAYER}, all tokens but the first)",
    labels=labels,
)

# %% [markdown]
# The members' effects are far more like θ₀'s than those of random vectors are. The random ones are not at 0: some
# likeness comes with the norm alone.
#
# ## The whole family
#
# In the bundled model the philosopher's family ends after 302 vectors, when nothing of norm 0.1 or more is left that helps. The
# KL of the next token to θ₀, for the family and its baselines:

# %%
whole = {number: pd.read_csv(f"results/family_{number}.csv") for number in (20, 4)}
tm.plots.kl_curve(
    whole[20], title="Philosopher (20): KL(vector ‖ θ₀) of the next token, by place in the family"
)

# %% [markdown]
# **Read the baselines first.** `unsteered` is where a vector that does nothing would be. The family starts far below it, and
# below random vectors of the same norms, and climbs: single vectors reach the unsteered level at about 240. (The line is a mean of
# the last 50, so it lags.) The family *at θ₀'s norm* lies near the unsteered line throughout: the effect
# needs the length. The same in distances, by blocks of fifty:


# %%
def by_block(frame, column, size=50):
    """The mean of a column for the family and its baselines, in blocks of the family's order."""
    own = frame[frame["kind"].isin(["family", "rescaled", "random"])]
    block = (own["index"] // size * size).rename("from vector")
    wide = own.groupby([block, "kind"])[column].mean().unstack("kind")
    unsteered = frame.loc[frame["kind"] == "unsteered", column].iloc[0]
    return wide[["family", "rescaled", "random"]].assign(unsteered=unsteered).round(2)


by_block(whole[20], "distance")

# %% [markdown]
# Rescaled to θ₀'s norm, the members keep little of the way: compare `rescaled` with `unsteered`. (In the last blocks the members are so short that rescaling makes
# them *longer*: no comparison.) Random vectors of the family's norms go farther away than unsteered. And the texts? By the rule from above:


# %%
def kinds_of_text(frame, size=50):
    own = frame[frame["kind"] == "family"].reset_index(drop=True)
    told = frame.set_index("kind")["completion"]
    rows = []
    for first in range(0, len(own), size):
        some = own[first : first + size]
        told_rows = share_like(
            [str(x) for x in some["completion"]], told["reference"], told["unsteered"]
        )
        rows.append({"from vector": first, **told_rows, "mean norm": some["norm"].mean()})
    return pd.DataFrame(rows).set_index("from vector").round(2)


kinds_of_text(whole[20])

# %% [markdown]
# The clear positive result of this notebook: the first blocks are of θ₀'s kind far more often than the last ones, whose vectors do
# nothing, and the intervals do not overlap. Is that the family, or what any vector of such a norm does? The tables of both families have a random vector
# of the same norm for each member, with its text. How many of the first 50 texts hold a word? (The words were chosen after reading θ₀'s texts; the table above
# counts by another rule.)


# %%
def that_hold(number, word):
    """Of the first 50 members, and of their random vectors, how many texts hold a word."""
    first = whole[number][whole[number]["index"].between(0, 49)]
    held = first["completion"].fillna("").str.contains(word, regex=False)
    return held.groupby(first["kind"]).sum()[["family", "random"]]


counted = {
    f"{n}, “{word}”": that_hold(n, word) for n, word in ((20, "AI"), (4, "AI"), (4, "year-old"))
}
pd.DataFrame(counted).T

# %% [markdown]
# So it is the directions, not the norm: the same norms in random directions leave the AI in most texts. A philosopher is reached from many orthogonal directions.
#
# Unlike the published family, which ended at jailbreaks and refusals, this one ends at the unsteered model.
#
# ### When KL is blind
#
# The same curve for the person's family (vector 4):

# %%
tm.plots.kl_curve(
    whole[4], title="Person (4): KL(vector ‖ θ₀) of the next token, by place in the family"
)

# %% [markdown]
# Little to see. The family starts at about 0.4 nats, and even the *unsteered* model is only about half a nat from θ₀. The next token can tell the
# family from random vectors of its norm, which are farther away. It cannot tell a person from an AI: both begin with "I'm". The texts can:

# %%
kinds_of_text(whole[4])

# %% [markdown]
# The table of words above says the same of this family, beside random vectors of its norms; `results/README.md` has all blocks. So choose a measure that can see the difference you ask about, and check that it separates θ₀ from nothing before you draw a curve of
# it.
#
# ## Do they add up?
#
# The mean of the first 2, 3, 10 or 20 of the philosopher's family, at the members' mean norm. By KL and by distance:

# %%
composed = {number: Table(pd.read_csv(f"results/composition_{number}.csv")) for number in (20, 4)}


def at_mean_norm(number):
    """Combinations at their members' mean norm, the first k and random ones, once each."""
    own = composed[number]
    return own[(own["combination"] == "mean") & (own["scaling"] == "mean norm")]


nothing = whole[20].set_index("kind").loc["unsteered"]
first = at_mean_norm(20)[at_mean_norm(20)["subset"] == "first"]
first[["size", "norm", "kl_to_reference", "distance", "completion"]].assign(
    kl_of_nothing=nothing["kl_to_reference"], distance_of_nothing=nothing["distance"]
)

# %% [markdown]
# **Two measures disagree.** By KL even the mean of twenty is much nearer to θ₀ than the unsteered model. By distance the means of ten and twenty are
# *farther* than unsteered. KL looks at one token's distribution; distance at everything in the stream, also at what
# the effect overshoots. The texts decide nothing for certain. Those of two, three and ten
# are of θ₀'s sort, and repeat themselves; that of twenty drifts.
#
# The first members and random subsets are not a fair comparison as they stand: later members are shorter, and so are subsets of them. For
# each sum of first members, take the random subset of the *nearest norm*:


# %%
def norm_matched(number):
    rows, own = [], at_mean_norm(number)
    for each in own[own["subset"] == "first"].to_dict("records"):
        others = own[(own["subset"] == "random") & (own["size"] == each["size"])]
        other = others.loc[(others["norm"] - each["norm"]).abs().idxmin()]
        rows.append(
            {
                "family": number,
                "size": each["size"],
                "norm, first": each["norm"],
                "norm, random": other["norm"],
                "KL, first": each["kl_to_reference"],
                "KL, random": other["kl_to_reference"],
                "distance, first": each["distance"],
                "distance, random": other["distance"],
            }
        )
    return pd.DataFrame(rows).round(2)


pd.concat([norm_matched(20), norm_matched(4)], ignore_index=True)

# %%
scattered = pd.concat([at_mean_norm(number).assign(family=number) for number in (20, 4)])
points = px.scatter(
    scattered, x="norm", y="kl_to_reference", color="subset", facet_col="family",
    hover_data=["size", "completion"], template="plotly_white", width=820, height=400,
    color_discrete_sequence=["#0072b2", "#d55e00"],
    labels={"kl_to_reference": "KL to θ₀ (nats)", "norm": "norm of the mean"},
    title="KL to θ₀ of means, at their members' mean norm",
)  # fmt: skip
points.update_layout(meta={"alt": "KL to theta0 against norm, first members and random subsets."})

# %% [markdown]
# * **Philosopher:** random subsets do worse, and much of that is their norm: in the picture the KL of random subsets falls with the norm. The first two and three have a random subset of nearly their
#   norm beside them, and do better by both measures. For ten and twenty no random subset is as long, so nothing can be said.
# * **Person:** the lowest KL of a mean, 0.39 for ten random members, belongs to the text of an AI ("I'm a brilliant and compassionate AI assistant"), while a mean
#   that keeps θ₀'s person has 0.50, hardly less than unsteered (0.52): this measure is blind here. Distance grows with each member that is added.
#   Two or three keep θ₀'s person ("I'm a 25-year-old software engineer", "I'm a 25-year-old male"). Ten do not ("I'm a
#   creative AI"), and twenty give another one ("I've been a language teacher"). The texts are in `results/composition_4.csv`; hover over the points.
#
# With three random subsets of each size this is a sketch, not a test.
#
# ## Does the model use these directions in natural activations?
#
# Take texts of philosophy and practical texts, without steering. If a direction meant "philosophy" to the model, the residual stream
# would project on it differently. A null result only counts if the test *can* find something. So there is a **positive control**: the difference of means of *other* texts of
# both kinds, a direction that is known to tell them apart.

# %%
PHILOSOPHY = [
    "What does it mean to exist? The question has no final answer, and yet every thinker returns to it.",
    "If every part of a ship is replaced, is it still the same ship? Identity may be a habit of the mind.",
    "The ancients held that virtue is the only good, and that fortune cannot touch a wise man.",
    "We never perceive the thing itself, only its appearance; so what right have we to speak of truth?",
    "Freedom is not the absence of causes, some argue, but the power to act from reasons of one's own.",
    "Time may be nothing but the order in which a consciousness finds its own experiences.",
]
PRACTICAL = [
    "Switch the machine off, open the cover at the back, and pull the cartridge out before cleaning it.",
    "The bus leaves from platform four at half past nine and stops twice before it reaches the station.",
    "Whisk the eggs with the sugar, fold in the flour, and bake the cake for forty minutes.",
    "Copper is drawn into wire, rolled into sheets, and mixed with zinc to make brass.",
    "The museum is open every day except Monday, and tickets are sold at the main entrance.",
    "Tighten the two screws on the left first, then check that the shelf is level.",
]
OTHER_PHILOSOPHY = [
    "Is beauty in the object or in the eye? Whoever asks has already assumed that the two can be parted.",
    "To know that one knows nothing was, for Socrates, the beginning of wisdom.",
    "A moral law that holds only when it suits us would be no law at all, but a preference.",
    "Perhaps the self is a story that is told so often that nobody remembers its author.",
]
OTHER_PRACTICAL = [
    "The river flows past three towns, and its lower course was straightened for the barges.",
    "Cut the wood to length, sand the edges, and drill four holes of six millimetres.",
    "The shop closes at six, and returns are accepted within two weeks with a receipt.",
    "Fill the tank with cold water and press the green button until the lamp stops blinking.",
]
scanned = tm.analysis.presence(
    model, tm.SteeringVectors(torch.cat([theta0.vectors, family.vectors]), dict(theta0.story)),
    PHILOSOPHY, PRACTICAL, other_texts=(OTHER_PHILOSOPHY, OTHER_PRACTICAL),
)  # fmt: skip
tm.plots.presence_points(scanned)

# %%
scanned[["kind", "index", "auroc", "p_value", "p_adjusted"]].round(3)

# %% [markdown]
# Row 0 is θ₀, the others its family, the last one the control. Look at the control first. If it is found (a small p), the test has power, and a null result counts: the directions that
# *make* a philosopher are then not the ones along which the model *reads* philosophy. Look at θ₀ next, before and after the correction (`p_adjusted`): a p above 0.05
# is not a proof of absence, and a few more texts would be worth their while.
#
# ## What you saw
#
# * A follower by your own hand, and … of them by the package; … % of the distance left.
# * The whole family: … vectors; of θ₀'s kind in the first block …, in the last ….
# * One measure that was blind, and two that disagreed.
# * Used by the model itself: …, with a control at AUROC ….
#
# ## Bonus, without answers
#
# * The author asked what a penalty on the norm does: `tm.melbo_ortho(f, theta0, 3, norm_penalty=0.001)`, then 0.01. `results/penalties.csv` has the
#   person's.
# * Grow a family from a *random* vector. How near do its followers come?
# * Does a follower work on another prompt? `tm.analysis.transfer`.
# * A measure of your own for the person's family that is not blind.
#
# ## Sources
#
# Jacob G-W 2024, [I found >800 orthogonal "write code" steering vectors](https://www.lesswrong.com/posts/CbSEZSpjdpnvBcEvc/i-found-greater-than-800-orthogonal-write-code-steering) ·
# Mack and Turner 2024, [Mechanistically eliciting latent behaviors in language models](https://www.lesswrong.com/posts/ioPnHKFyy4Cw2Gr2x/mechanistically-eliciting-latent-behaviors-in-language-1) ·
# Benjamini and Hochberg 1995, *Controlling the false discovery rate*
#
# **Next:** `05_other_ways`: what other methods find on the same prompt.
