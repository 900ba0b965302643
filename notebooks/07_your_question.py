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
# # Your question
#
# A template for an afternoon and a question about a vector: a hypothesis, a baseline, prompts that were not used to find the vector, samples, one test, one picture, one
# sentence. It is filled in with an example. Replace the cells marked ✏️ by yours.
#
# **You learn to** turn "this vector means X" into a claim that can fail · measure a whole continuation instead of one token · compute a permutation
# p-value by hand.
#
# **You need** `02_is_it_real`. **Time** 20 minutes for the example, an afternoon for your own; the cells run in about two minutes on a
# laptop.
#
# **Another model** takes other values in the next cell, and no other change. The example's hypothesis, and what the end says of it, are of the
# bundled model.

# %% tags=["parameters"]
MODEL = None  # None is the bundled SmolLM2-135M-Instruct; or a hub id, a folder, a .gguf file
PROMPT = "Tell me about yourself."
CHAT = True  # False for a base model, which has no chat template
SOURCE_LAYER, TARGET_LAYER = 8, 16  # None, None: a quarter and half of another model's depth
RADIUS = 12.0  # the norm of the vectors; None, for another model, measures one to begin with
CHOSEN = 4  # which vector of the library the question is about
N_RANDOM = 3
N_SAMPLES = 2  # of each prompt, beside the greedy text
MAX_NEW_TOKENS = 16

# %%
import pandas as pd
import plotly.express as px
import torch

import tl_melbo as tm
from tl_melbo.course import Note
from tl_melbo.course import question as check

model = tm.load_model(MODEL)
if SOURCE_LAYER is None:
    SOURCE_LAYER, TARGET_LAYER = model.cfg.n_layers // 4, model.cfg.n_layers // 2
f = tm.ActivationMap.from_prompts(model, PROMPT, SOURCE_LAYER, TARGET_LAYER, chat=CHAT)
RADIUS = RADIUS or tm.calibrate_radius(f)
chosen = tm.melbo(f, CHOSEN + 1, radius=RADIUS)[CHOSEN]
random = tm.random_vectors(f, N_RANDOM, RADIUS, seed=1)
tm.generate(model, PROMPT, chosen, scales=[0, 1], max_new_tokens=MAX_NEW_TOKENS)[
    ["scale", "completion"]
]

# %% [markdown]
# ## 1. The hypothesis ✏️
#
# Write it so that it can be wrong, and write down what would make it wrong, *before* the next cell runs.
#
# > **Example.** The vector means "a person speaks". So it changes answers to questions *about the speaker* more than answers to other questions.
# > Wrong if the difference between the two kinds is no larger than a random relabelling of the prompts gives, or if random vectors show it, too.
#
# ## 2. Prompts that were not used to find it ✏️
#
# Ten at least of each kind. The prompt of the search is in neither.

# %%
PERSONAL = [
    "What did you do last weekend?",
    "Where did you grow up?",
    "Who made you?",
    "What is your favourite food?",
    "Do you have any brothers or sisters?",
    "What are you afraid of?",
    "How old are you?",
    "What do you do for a living?",
    "What makes you happy?",
    "Describe your best friend.",
]
IMPERSONAL = [
    "Write a poem about the sea.",
    "How do I bake bread?",
    "What is the capital of Australia?",
    "Explain how a bicycle stays upright.",
    "List three uses of copper.",
    "Why is the sky blue?",
    "What is the difference between a virus and a bacterium?",
    "How do I change a flat tyre?",
    "Summarise the plot of Romeo and Juliet.",
    "What is a prime number?",
]
KINDS = {"personal": PERSONAL, "impersonal": IMPERSONAL}

# %% [markdown]
# ## 3. The measure
#
# The next token's KL hangs on one word. Take the whole continuation: the steered model writes, and at each of its tokens we ask how far the unsteered one is from it. The
# mean over texts $y$ of the sum over their tokens is the KL of the whole continuation, in nats:
#
# $$\mathrm{KL}(P_\theta \| P_0) = \mathbb{E}_{y \sim P_\theta} \sum_t \mathrm{KL}\big(P_\theta(\cdot \mid y_{<t}) \,\|\, P_0(\cdot \mid y_{<t})\big)$$

# %%
both = tm.SteeringVectors(torch.cat([chosen.vectors, random.vectors]), dict(random.story))
prompts = [prompt for some in KINDS.values() for prompt in some]
kind_of = {prompt: kind for kind, some in KINDS.items() for prompt in some}
texts = tm.generate(
    model, prompts, both, max_new_tokens=MAX_NEW_TOKENS, n_samples=N_SAMPLES, chat=CHAT
)
tokens = tm.analysis.token_divergence(model, texts, both, chat=CHAT)
sampled = tokens[tokens["sample"] > 0]
of_text = sampled.groupby(["vector", "prompt", "sample"])["kl"].sum()
kl = of_text.groupby(["vector", "prompt"]).mean().reset_index()
kl["kind"] = kl["prompt"].map(kind_of)
kl["vectors"] = kl["vector"].map(lambda number: "chosen" if number == 0 else "random")

# %% [markdown]
# The samples are drawn at temperature 0.7, the package's default, so they are more likely texts than draws from $P_\theta$ itself. With that, and two of
# them a prompt, this is a rough measure and not quite the formula. It is made alike for all vectors and prompts, so the numbers can be compared. The greedy text is left out.
#
# Random vectors of the same norm on the same prompts are the baseline.

# %%
kl.groupby(["vectors", "kind"])["kl"].describe()[["count", "mean", "50%", "min", "max"]].round(2)

# %% [markdown]
# ## 4. The test
#
# Are the two kinds of prompts different, or would a random relabelling give as much?
#
# ### Exercise 1: a permutation test
#
# **Difficulty** 🔴🔴⚪⚪⚪ · **Importance** 🔵🔵🔵🔵🔵 · up to 15 minutes
#
# Write `permutation_p(a, b)`: the two-sided p-value of the difference of the means of two lists of numbers. Draw at least 2000 random relabellings. A p-value is never 0: count the relabelling that was observed among them.

# %% tags=["answer"]
permutation_p = ...

# %%
check.permutation_p(permutation_p)

# %% [markdown]
# <details><summary>Hint</summary>
#
# Put all numbers in one tensor, permute it, cut it where the first list ends, and take the absolute difference of the means. How often is it at least
# what was observed? Give your generator a seed.
# </details>
#
# <details><summary>Solution</summary>
#
# ```python
# def permutation_p(a, b, n=5000, seed=0):
#     generator = torch.Generator().manual_seed(seed)
#     values = torch.tensor([*a, *b], dtype=torch.float64)
#
#     def difference(row):
#         return (row[: len(a)].mean() - row[len(a) :].mean()).abs()
#
#     observed = difference(values) - 1e-12
#     reached = sum(
#         bool(difference(values[torch.randperm(len(values), generator=generator)]) >= observed)
#         for _ in range(n)
#     )
#     return (1 + reached) / (1 + n)
# ```
# </details>
#
# The same by SciPy, for the chosen vector and for each random one, with the AUROC (the chance that a personal prompt's KL is above an impersonal one's):

# %%
from scipy import stats

rows = []
for number, own in kl.groupby("vector"):
    a, b = (own.loc[own["kind"] == kind, "kl"].to_numpy() for kind in KINDS)
    test = stats.permutation_test((a, b), lambda x, y: x.mean() - y.mean(), n_resamples=4999, rng=0)
    auroc = stats.mannwhitneyu(a, b).statistic / (len(a) * len(b))
    rows.append(
        {
            "vector": "chosen" if number == 0 else f"random {number}",
            "mean, personal": a.mean(),
            "mean, impersonal": b.mean(),
            "difference": a.mean() - b.mean(),
            "AUROC": auroc,
            "p": test.pvalue,
        }
    )
tested = pd.DataFrame(rows)
tested.round(3)

# %% [markdown]
# ## 5. One picture

# %%
picture = px.strip(
    kl, x="kind", y="kl", color="vectors", hover_data=["prompt"], template="plotly_white",
    width=720, height=460, color_discrete_sequence=["#d55e00", "#57606a"],
    labels={"kl": "KL of the continuation to unsteered (nats)", "kind": ""},
    title=f"What the vector changes, by kind of prompt ({len(PERSONAL)} and {len(IMPERSONAL)} held-out prompts)",
)  # fmt: skip
medians = kl.groupby(["vectors", "kind"])["kl"].median().round(1)
picture.update_layout(
    meta={"alt": f"Points of KL by kind of prompt; medians: {medians.to_dict()}."}
)

# %% [markdown]
# ## 6. Read them
#
# Greedy texts of both kinds, chosen vector, beside unsteered. No number replaces this.

# %%
few = [prompt for some in KINDS.values() for prompt in some[:4]]
plain = tm.generate(model, few, max_new_tokens=MAX_NEW_TOKENS, chat=CHAT)
greedy = texts[(texts["vector"] == 0) & (texts["sample"] == 0)].set_index("prompt")["completion"]
plain.assign(steered=[greedy[prompt] for prompt in plain["prompt"]])[
    ["prompt", "completion", "steered"]
].rename(columns={"completion": "unsteered"})

# %% [markdown]
# ## 7. One sentence
#
# The cell below writes it from the numbers, by the rule that was fixed in section 1. It says "not shown" as readily as "shown".

# %%
ours, theirs = tested.iloc[0], tested.iloc[1:]
alone = not ((theirs["p"] < 0.05) & (theirs["difference"] > 0)).any()
holds = ours["p"] < 0.05 and ours["difference"] > 0
Note(
    f"On {len(PERSONAL)} personal and {len(IMPERSONAL)} other held-out prompts the vector changed personal answers by "
    f"{ours['mean, personal']:.1f} nats and others by {ours['mean, impersonal']:.1f} (permutation p = {ours['p']:.3f}, "
    f"AUROC {ours['AUROC']:.2f}); the hypothesis is {'shown' if holds and alone else 'not shown'}. "
    + ("No random vector shows the same." if alone else "A random vector shows the same.")
)

# %% [markdown]
# **In the bundled model** the difference is there, and the test of the chosen vector alone would have been published. The random vectors take the conclusion back: one of three shows the same, and all three lean
# that way. Personal answers seem to be easier to move by *anything*. So "it changes personal answers more" says little about this vector. A better question would compare with the random vectors prompt by prompt.
#
# What does stand: the vector moves *both* kinds further than random vectors of its norm do: personal answers nearly four times as far, impersonal ones three times by the mean and twice by the median (the table of section 3).
# Three random vectors give no interval, but it is a different finding: a large effect is not a meaning.
#
# ## Your turn: half a page ✏️
#
# 1. The question, and what would have answered it the other way.
# 2. The baseline, and what it did.
# 3. Held-out prompts: how many, from where, chosen by whom, before or after you looked?
# 4. Samples, or one greedy text?
# 5. The picture.
# 6. How many things did you try before this one?
#
# Point 6 is the one that is left out most often. A p-value of 0.03 is no surprise in thirty tries.
#
# ## Ideas, without answers
#
# * Does the contrastive vector of `05_other_ways` pass this test?
# * The mean of three of a family (`04_orthogonal_families`): does it change the same prompts as θ₀? (Correlate the two columns.)
# * A vector that was found on *your* prompt, in *your* language.
# * Over-refusal: prompts such as "How do I kill a Python process?" on a model that refuses. Which sign helps?
#
# ## Sources
#
# Fisher 1935, *The design of experiments* (the permutation test) · Phipson and Smyth 2010, [Permutation p-values should never be zero](https://doi.org/10.2202/1544-6115.1585)
