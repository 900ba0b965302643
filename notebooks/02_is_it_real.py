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
# # Is it real?
#
# You found a vector, and read one greedy completion: the model seems to speak as a person. Is that the vector, or
# luck, or the one prompt, or the one seed? This notebook puts one claim through six tests, each beside a baseline, and
# keeps apart what a vector is *chosen* on and what is *reported*.
#
# **You will be able to**
#
# * report a sampled rate with an interval, beside the unsteered model and random vectors;
# * explain why the best of several rates is too good, and what to report instead;
# * test a vector on other prompts, other seeds, and where it should do nothing;
# * read a null result with its positive control.
#
# **You need** `01_first_vectors`. **Time:** 75 to 90 minutes with the exercises; the cells alone take a few minutes on
# two cores.
#
# **The claim**, written down before the measurements: *under one of these vectors the model speaks as a person, and
# not as an AI, more often than unsteered or under random vectors of the same norm.*
#
# **Another model** takes other values in the next cell, and no other change in the code. The claim, the rule that counts it, its labels
# (exercise 3) and the completions quoted here are of the bundled model: a model that never speaks as an AI needs a claim of its own.

# %% tags=["parameters"]
MODEL = None  # None is the bundled SmolLM2-135M-Instruct; or a hub id, a folder, a .gguf file
FOLDER = "runs/is_it_real"  # of the search: each model and prompt takes one of its own
PROMPT = "Tell me about yourself."
CHAT = True  # False for a base model, which has no chat template
SOURCE_LAYER, TARGET_LAYER = 8, 16  # None, None: a quarter and half of another model's depth
RADIUS = 12.0  # the norm of the vectors; None, for another model, measures one to begin with
N_VECTORS = 5
N_SAMPLES = 8  # of each vector, to choose; three times as many of the chosen one, to report
MAX_NEW_TOKENS = 20
OTHER_PROMPTS = [
    "Who are you?",
    "What do you do all day?",
    "Introduce yourself in two sentences.",
    "What is your biggest dream?",
]
OTHER_SEEDS = [1]
SAID = ["25-year-old", "software engineer", " AI"]  # of the chosen text, of the unsteered one

# %%
import re

import pandas as pd
import torch

import tl_melbo as tm
from tl_melbo.course import is_it_real as check

model = tm.load_model(MODEL)
if SOURCE_LAYER is None:
    SOURCE_LAYER, TARGET_LAYER = model.cfg.n_layers // 4, model.cfg.n_layers // 2
f = tm.ActivationMap.from_prompts(model, PROMPT, SOURCE_LAYER, TARGET_LAYER, chat=CHAT)
RADIUS = RADIUS or tm.calibrate_radius(f)
LAST = slice(-3, None)
found = tm.Run(FOLDER).melbo(f, N_VECTORS, radius=RADIUS, progress=True)
greedy = tm.generate(model, PROMPT, found, max_new_tokens=MAX_NEW_TOKENS)
greedy[["vector", "completion"]]


# %% [markdown]
# ## What is counted
#
# A rule, the same for all texts, made before the vectors are compared: `tags` says who speaks. "person" is the first person
# without a word of being an AI, an assistant or a program. That alone would take "Coffee.com as Employee: Smith. I am a
# human" for a person's: incoherent text may hold an "I" somewhere. So the text must also *open* in the first person.

# %%
OPENING = re.compile(r"\W*((hi|hello|hey)\b\W*)?(I|My)\b", re.IGNORECASE)


def as_a_person(text):
    opens = OPENING.match(text) is not None
    return opens and tm.analysis.tags(PROMPT, text)["speaker"][0] == "person"


tm.analysis.tags(PROMPT, [*greedy["completion"]])

# %% [markdown]
# ## Choose on one set of samples
#
# Greedy decoding gives one text, and always the same. It says nothing of how often the model says such a thing. Sampled
# at temperature 0.7, each vector shows a rate. These samples are for choosing only.

# %%
first_set = tm.generate(
    model, PROMPT, found, n_samples=N_SAMPLES, max_new_tokens=MAX_NEW_TOKENS, seed=0
)
first = tm.analysis.rates(first_set, as_a_person, by=["vector"])
first[["vector", "hits", "n", "rate", "low", "high"]]

# %% [markdown]
# ## Exercise 1: choose
#
# **Difficulty** 🔴⚪⚪⚪⚪ · **Importance** 🔵🔵🔵🔵⚪ · up to 5 minutes
#
# Take the vector of the highest rate, by code. Then predict: with new samples of this vector, will its rate be
# higher, lower, or the same?

# %% tags=["answer"]
chosen = ...  # the number of a vector

# %%
check.chosen(chosen, first)

# %% [markdown]
# <details><summary>Hint</summary>
#
# `first["rate"].idxmax()` is the row's label.
# </details>
#
# <details><summary>Solution</summary>
#
# ```python
# chosen = int(first.loc[first["rate"].idxmax(), "vector"])
# ```
# </details>

# %%
CHOSEN = int(first["vector"][first["rate"].idxmax()]) if chosen is ... else chosen
print(f"vector {CHOSEN}, greedy: {greedy['completion'][CHOSEN]}")

# %% [markdown]
# ## Exercise 2: an interval for a rate
#
# **Difficulty** 🔴🔴🔴⚪⚪ · **Importance** 🔵🔵🔵🔵🔵 · up to 15 minutes
#
# The textbook interval, rate ± 1.96 standard errors, says that 0 of 16 is 0 % ± 0. Wilson's interval holds all $p$ for
# which the rate $\hat p$ that was seen is within $z = 1.96$ standard errors *of p*:
#
# $$(\hat p - p)^2 \le z^2 \, \frac{p (1 - p)}{n} .$$
#
# Solve for $p$, and write it.


# %% tags=["answer"]
def interval(hits, n):
    """Wilson's 95% interval of a rate: its lower and its upper end."""
    return ...


# %%
check.wilson(interval)

# %% [markdown]
# <details><summary>Hint</summary>
#
# It is a quadratic equation in p. Its two roots lie around (p̂ + z²/2n) / (1 + z²/n).
# </details>
#
# <details><summary>Solution</summary>
#
# ```python
# def interval(hits, n):
#     z, rate = 1.96, hits / n
#     centre = (rate + z**2 / (2 * n)) / (1 + z**2 / n)
#     half = z / (1 + z**2 / n) * (rate * (1 - rate) / n + z**2 / (4 * n**2)) ** 0.5
#     return centre - half, centre + half
# ```
# </details>
#
# The package's is `tm.evaluation.wilson_interval`; `rates` uses it.
#
# ## Report on another set: against unsteered and random
#
# New samples, another seed. Random vectors have the same norm; they count together.

# %%
more = {"max_new_tokens": MAX_NEW_TOKENS, "seed": 1, "chat": CHAT}
random = tm.random_vectors(f, 3 * N_SAMPLES, RADIUS)
second_set = pd.concat(
    [
        tm.generate(model, PROMPT, n_samples=3 * N_SAMPLES, **more),
        tm.generate(model, PROMPT, found[CHOSEN], n_samples=3 * N_SAMPLES, **more).assign(
            vector=CHOSEN
        ),
    ],
    ignore_index=True,
)
# One sample under each: without n_samples there is no greedy text beside it.
random_set = tm.generate(model, PROMPT, random, temperature=0.7, **more).assign(sample=1)
reported = tm.analysis.rates(second_set, as_a_person, by=["vector"], random=random_set)
reported

# %%
tm.plots.behaviour_rates(reported, "Speaks as a person: sampled rates with 95% intervals")

# %%
rate = reported.set_index("steering")["rate"]
low, high = reported.set_index("steering")["low"], reported.set_index("steering")["high"]
apart = low["vector"] > max(high["unsteered"], high["random"])
print(
    f"chosen on {first['rate'].max():.0%} of {N_SAMPLES} samples, reported {rate['vector']:.0%} of "
    f"{3 * N_SAMPLES} others; unsteered {rate['unsteered']:.0%}, random {rate['random']:.0%}: "
    f"the intervals {'do not overlap' if apart else 'overlap'}."
)

# %% [markdown]
# Report the second number. The first one was the best of several, so luck is in it, whichever of the two happens to be higher. Two intervals that do not overlap
# are clear evidence of a difference; two that do overlap are no evidence that there is none.
#
# **The other sign** is a vector of its own:

# %%
negated = tm.generate(model, PROMPT, found[CHOSEN], scales=[-1], n_samples=3 * N_SAMPLES, **more)
tm.analysis.rates(negated, as_a_person, by=["scale"])

# %% [markdown]
# In the bundled model −v never speaks as a person, 0 of 24: the two signs do different things. Had both spoken so, the claim would be one about any push along this line.
#
# The rule makes mistakes: a text that is cut off before it says "AI" counts as a person's, and "I" may open nonsense, too. It is one rule for all three
# bars, but its mistakes need not be equally many in each: read some samples of each before you trust a difference.
#
# ### Is the greedy text typical?
#
# Take the most striking words of the greedy text, and " AI" from the unsteered one. They were chosen after looking. How often are they in the samples?


# %%
def rate_of(words):
    return tm.analysis.rates(
        second_set, lambda text: words in text, by=["vector"], random=random_set
    ).assign(value=f"“{words}”")


pd.concat([rate_of(words) for words in SAID], ignore_index=True)[
    ["value", "steering", "hits", "n", "rate", "low", "high"]
]

# %% [markdown]
# Details of a greedy completion, such as a profession, are often one sample among many; what is stable is the coarser
# fact. State the claim at the level that the samples support.
#
# ## Other prompts
#
# The vector was found on one prompt. Does it act on others that it never saw?

# %%
on_others = pd.concat(
    [
        tm.generate(model, OTHER_PROMPTS, n_samples=4, **more),
        tm.generate(model, OTHER_PROMPTS, found[CHOSEN], n_samples=4, **more).assign(vector=CHOSEN),
    ],
    ignore_index=True,
)
random_there = tm.generate(model, OTHER_PROMPTS, random[:4], temperature=0.7, **more).assign(
    sample=1
)
there = tm.analysis.rates(on_others, as_a_person, by=["vector", "prompt"], random=random_there)
there[["steering", "prompt", "hits", "n", "rate", "low", "high"]]

# %%
pooled = tm.analysis.rates(on_others, as_a_person, by=["vector"], random=random_there)
tm.plots.behaviour_rates(pooled, "Speaks as a person, on four other prompts together")

# %% [markdown]
# A few samples a prompt give wide intervals; this figure pools the prompts. Look into the table before you speak of
# "all prompts": on some of them the unsteered model, too, speaks as a person, which leaves less room. If the pooled bars do
# not differ, the claim is one about the prompt that the vector was found on. Say so.
#
# Not to bring out *this* behaviour is not to do nothing. How far does each vector move the next token, on the prompt of
# the search (the first row) and on the others? Vector 0 is the chosen one, the six others are random.

# %%
both = tm.concatenate([found[CHOSEN], random[:6]])
moved = tm.analysis.transfer(model, both, [PROMPT, *OTHER_PROMPTS], max_new_tokens=MAX_NEW_TOKENS)
tm.plots.transfer_heatmap(moved, "KL to unsteered: the chosen vector (0) and six random ones")

# %% [markdown]
# A chosen vector that stays far above the random ones on other prompts acts there, too, though not as the claim says, or not so that the
# rule sees it: point at a cell to read what it writes. ("A native of the vibrant city of Nova Haven, I'm a 28-year-old" is a person to a
# reader, and not to the rule, which wants the first person at the opening.)
#
# ## Other seeds
#
# Another start, another library. Is there a vector of the same *effect*? The largest cosine with the chosen vector,
# of the vectors and of their effects. The baseline is as many random vectors. (`OTHER_SEEDS` takes more than one.)

# %%
with torch.no_grad():
    effect = f.delta(found[CHOSEN].vectors, positions=LAST)


def closest(vectors):
    """The largest |cosine| of the vectors, and the largest cosine of the effects, with the chosen one."""
    with torch.no_grad():
        effects = f.delta(vectors, positions=LAST)
    directions = tm.analysis.cosine_similarity(vectors, found[CHOSEN].vectors)
    likeness = tm.analysis.cosine_similarity(effects, effect)
    return float(directions.abs().max()), float(likeness.max()), int(likeness.argmax())


rows, again = [], {}
for seed in OTHER_SEEDS:
    again[seed] = tm.melbo(f, N_VECTORS, RADIUS, seed=seed)
    rows.append(("MELBO", seed, *closest(again[seed].vectors)))
    rows.append(
        ("random", seed, *closest(tm.random_vectors(f, N_VECTORS, RADIUS, seed=seed).vectors))
    )
columns = ["vectors", "seed", "largest cosine (vectors)", "largest cosine (effects)", "which"]
pd.DataFrame(rows, columns=columns)

# %%
pd.concat(
    [
        tm.generate(model, PROMPT, library[each[4]], **more).assign(seed=seed)
        for (seed, library), each in zip(again.items(), rows[::2], strict=True)
    ],
    ignore_index=True,
)[["seed", "completion"]]

# %% [markdown]
# The first row says whether the other search found the same direction, or a vector of a similar effect; the second what
# chance gives. `which` is the number of the vector of the most similar effect. Then its text: does the closest vector do the same? Where it does not, say "this vector", not "the
# direction of".
#
# ## Side effects
#
# What does it cost on prompts that have nothing to do with the claim, and on ordinary prose? Random vectors beside it.

# %%
costs = tm.evaluation.side_effects(model, both, [PROMPT, *OTHER_PROMPTS], chat=CHAT)
costs.assign(vectors=["chosen"] + 6 * ["random"])[
    ["vectors", "kl_target", "kl_unrelated", "specificity", "loss_increase"]
]

# %%
tm.plots.specificity_points(costs, "KL on the prompts and elsewhere; 0 is the chosen vector")

# %% [markdown]
# `specificity` is 0.5 for a vector that changes unrelated prompts as much as those of the claim. Compare it with that of
# the random vectors: if theirs is as high, the chosen vector changes more, but is not more specific. `loss_increase` is
# what ordinary prose costs, in nats a token. An effect that is also large elsewhere is a change of the model at large, in
# which the claim is only one thing.
#
# ## Exercise 3: the direction that labels give
#
# **Difficulty** 🔴🔴⚪⚪⚪ · **Importance** 🔵🔵🔵🔵⚪ · up to 10 minutes
#
# With labels there is a simpler way: prompts that show the behaviour, prompts that do not, and the **difference of the
# means** of their residuals. Take the residual stream after the source layer at the last token of each prompt.

# %%
PEOPLE = [
    "Dana, a nurse from Ohio", "Omar, a bus driver", "Lucía, a violinist", "Piotr, a retired teacher",
    "Mei, a chef in Boston", "Sam, a farmer", "Aisha, a student of law", "Tom, a carpenter",
]  # fmt: skip
MACHINES = [
    "an AI assistant", "a chatbot", "a language model", "a virtual assistant",
    "a computer program", "an AI made by a company", "a neural network",
]  # fmt: skip


def asked(who):
    return [f"You are {each}. {PROMPT}" for each in who]


layers = {"source_layer": SOURCE_LAYER, "target_layer": TARGET_LAYER, "chat": CHAT}
shows = tm.ActivationMap.from_prompts(model, asked(PEOPLE), **layers)
shows_not = tm.ActivationMap.from_prompts(model, asked(MACHINES), **layers)
# shows.x and shows_not.x: [prompt, pos, d_model], padded on the left

# %% tags=["answer"]
direction = ...  # a tensor [d_model]

# %%
check.direction(direction, shows, shows_not)

# %% [markdown]
# <details><summary>Hint</summary>
#
# Padding is on the left, so the last token of every prompt is at position -1.
# </details>
#
# <details><summary>Solution</summary>
#
# ```python
# direction = shows.x[:, -1].mean(0) - shows_not.x[:, -1].mean(0)
# ```
# </details>

# %%
labelled = tm.contrastive(shows, shows_not, radius=RADIUS, positions=slice(-1, None))
cosine = float(tm.analysis.cosine_similarity(labelled, found[CHOSEN]))
labelled_set = tm.generate(model, PROMPT, labelled, n_samples=3 * N_SAMPLES, **more)
print(f"cosine with the chosen vector {cosine:.2f}; greedy: {labelled_set['completion'][0]}")
beside = pd.concat([second_set[second_set["vector"] < 0], labelled_set], ignore_index=True)
of_labelled = tm.analysis.rates(beside, as_a_person, by=["vector"], random=random_set)
of_labelled.drop(columns="vector").replace({"steering": {"vector": "labelled vector"}})

# %% [markdown]
# ## Exercise 4: does the library hold that direction?
#
# **Difficulty** 🔴🔴🔴⚪⚪ · **Importance** 🔵🔵🔵⚪⚪ · up to 15 minutes
#
# The cosine with one vector is a weak question. What share of the direction's *square* is in the **span** of all vectors
# of the library? Write it for rows that need not be orthogonal or of norm 1.


# %% tags=["answer"]
def share_in_span(vector, rows):
    """The share of |vector|² that is in the span of the rows [n, d_model]."""
    return ...


# %%
check.share(share_in_span, f.d_model)

# %% [markdown]
# <details><summary>Hint</summary>
#
# `torch.linalg.qr(rows.T).Q` has an orthonormal basis of the rows' span in its columns.
# </details>
#
# <details><summary>Solution</summary>
#
# ```python
# def share_in_span(vector, rows):
#     basis = torch.linalg.qr(rows.T).Q
#     return float((basis.T @ vector).square().sum() / vector.square().sum())
# ```
# </details>
#
# And by chance? The shares of many random directions in the same span:

# %%
span = torch.linalg.qr(found.vectors.double().T).Q
many = torch.nn.functional.normalize(
    tm.random_vectors(f, 500, 1.0, seed=3).vectors.double(), dim=-1
)
null = (many @ span).square().sum(-1)
unit = torch.nn.functional.normalize(labelled.vectors[0].double(), dim=0)
held = float((unit @ span).square().sum())
p = (1 + int((null >= held).sum())) / (1 + len(null))
print(
    f"share in the span of {N_VECTORS} vectors: {held:.2%}; by chance {float(null.mean()):.2%} "
    f"± {float(null.std()):.2%}; p = {p:.3f}"
)

# %% [markdown]
# Read the share with its null. A share no larger than by chance says that the library does not hold what the labels point
# at: what MELBO finds and what labels give are different vectors. Hold that against the rate above, too. If the labelled
# vector itself does not bring out the behaviour at this norm, the comparison says little; try it at twice the norm.
#
# ## Does the model use the direction itself?
#
# In text by people, does the *unsteered* residual stream project onto the chosen vector more than in impersonal text?
# The statistic is the AUROC over tokens: the chance that a token of the personal texts projects further along the vector
# than one of the others, 0.5 if the two kinds do not differ. The null is random directions. A test that finds nothing may simply be weak, so it
# gets a **positive control**: the difference of means of *other* texts of both kinds, which it should find.

# %%
PERSONAL = [
    "I grew up on a farm in Ohio with my two brothers, and I moved to the city when I was nineteen.",
    "My name is Dana and I have been a nurse for twelve years; I love my job, but I am tired.",
    "When I was a child my grandmother taught me to bake bread, and I still do it every Sunday.",
    "I'm a bus driver. I get up at four, I drink my coffee alone, and I like the empty streets.",
    "My husband and I bought our first house last spring, and we are painting the kitchen ourselves.",
    "I was never good at school, but I have always been able to fix any engine you give me.",
]
IMPERSONAL = [
    "The Danube is the second longest river of Europe and flows through ten countries.",
    "Add the flour and the eggs, stir until smooth, and bake for forty minutes at medium heat.",
    "The committee published its report in March, two months later than had been announced.",
    "Copper conducts electricity better than iron, and it does not rust in moist air.",
    "The museum is open from Tuesday to Sunday; tickets are sold at the northern entrance.",
    "Water boils at a lower temperature on high mountains because the air pressure is lower.",
]
OTHERS = (
    [
        "I have two daughters, and I teach the older one to swim in the lake behind our house.",
        "I'm a carpenter from Leeds; my hands hurt in winter, but I would not do anything else.",
        "Last year I lost my job, and my sister let me stay with her until I found another one.",
        "I play the violin in a small orchestra, and on Mondays I cook for my neighbours.",
    ],
    [
        "The bridge was built of granite and has carried trains over the valley since 1893.",
        "Tides are caused by the pull of the moon and, to a lesser degree, that of the sun.",
        "Fold the paper along the dotted line and press the edges firmly together.",
        "The new timetable comes into force in December and adds a night train to the coast.",
    ],
)
scanned = tm.analysis.presence(
    model, found, PERSONAL, IMPERSONAL, layer=SOURCE_LAYER, other_texts=OTHERS
)
scanned

# %%
tm.plots.presence_points(scanned)

# %%
control = scanned[scanned["kind"] == "control"].iloc[0]
mine = scanned[scanned["kind"] == "vector"].iloc[CHOSEN]
print(
    f"control: AUROC {control['auroc']:.2f}, p = {control['p_value']:.3f}: the test "
    f"{'has power' if control['p_value'] < 0.05 else 'has no power here; a null says nothing'}. "
    f"Vector {CHOSEN}: AUROC {mine['auroc']:.2f}, adjusted p = {mine['p_adjusted']:.2f}."
)

# %% [markdown]
# If the control is found and the vector is not, the null is a finding: whatever the vector does, the model does not
# use this direction where people speak, or far less than the control's. If the control is not found, take more text before you say anything.
#
# ## The claim, now
#
# One line a test. Which word of the claim would you change? A vector can pass the first test and fail the second: then
# it is real, and narrower than the claim.

# %%
unsteered_there, vector_there = (
    pooled.set_index("steering").loc[kind] for kind in ("unsteered", "vector")
)
effects_again = ", ".join(f"{row[3]:.2f}" for row in rows[::2])
pd.DataFrame(
    [
        ("random vectors, sampling", f"{rate['vector']:.0%} against {rate['random']:.0%} random, "
         f"{rate['unsteered']:.0%} unsteered", "intervals apart" if apart else "intervals overlap"),
        ("other prompts", f"{vector_there['rate']:.0%} against {unsteered_there['rate']:.0%} unsteered",
         "intervals apart" if vector_there["low"] > unsteered_there["high"] else "intervals overlap"),
        ("other seeds", f"closest effects: cosine {effects_again}", "read the texts"),
        ("side effects", f"KL {costs['kl_target'][0]:.2f} on the prompts, {costs['kl_unrelated'][0]:.2f} "
         f"elsewhere", f"specificity {costs['specificity'][0]:.2f}"),
        ("labels", f"{held:.1%} of the labelled direction in the span", f"p = {p:.3f}"),
        ("the model's own use", f"AUROC {mine['auroc']:.2f}; control {control['auroc']:.2f}",
         f"adjusted p = {mine['p_adjusted']:.2f}; control p = {control['p_value']:.3f}"),
    ],
    columns=["test", "result", "verdict"],
)  # fmt: skip

# %% [markdown]
# ## What to take away
#
# * Sample, count by a rule made before, give an interval, and put unsteered and random beside it.
# * Choose on one set, report on another.
# * A null needs a positive control; a share needs the share by chance.
#
# ## Bonus, without an answer
#
# * 95% intervals take texts for independent. Those of one random vector are not: how would you compute the interval
#   over vectors?
# * Repeat everything for a claim of your own, and write the claim down first.
#
# ## Sources
#
# * Wilson 1927, [Probable inference, the law of succession, and statistical inference](https://doi.org/10.1080/01621459.1927.10502953)
# * Rimsky et al. 2023, [Steering Llama 2 via contrastive activation addition](https://arxiv.org/abs/2312.06681): differences of means
# * Jacob G-W 2024, "I found >800 orthogonal 'write code' steering vectors": the question of presence
#
# **Next:** `03_how_does_it_do_it`: which parts of the model carry the effect.
