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
# # An orthogonal family
#
# You found a vector that makes the model speak as a person. Is *that* the direction of speaking as a
# person? **MELBO-ortho** asks for another vector with the same effect, orthogonal to the first; then for
# another, orthogonal to both; and so on until nothing is left.
#
# Jacob G-W found more than 800 orthogonal vectors that all make Qwen1.5-1.8B-Chat write code. This
# notebook finds a few live, shows a whole family of the embedded model that was computed before, and asks
# four questions about it: are they the same direction, do they do the same, how long are they, and do
# they add up?

# %% tags=["parameters"]
MODEL = None  # None is the embedded SmolLM2-135M-Instruct; or a hub id, a folder, a .gguf file
PROMPT = "Tell me about yourself."
SOURCE_LAYER, TARGET_LAYER = 8, 16
RADIUS = 12.0
THETA0 = 4  # which vector of the library the family grows from: read their texts, and choose
N_FAMILY = 8
MAX_NEW_TOKENS = 30

# %%
import pandas as pd
import torch

import tl_melbo as tm

model = tm.load_model(MODEL)
f = tm.ActivationMap.from_prompts(
    model, PROMPT, source_layer=SOURCE_LAYER, target_layer=TARGET_LAYER, chat=True
)
run = tm.Run("runs/family")  # keeps each vector as it comes; with other settings, another folder
found = run.melbo(f, THETA0 + 1, radius=RADIUS, progress=True)
theta0 = found[THETA0]
tm.generate(model, PROMPT, theta0, max_new_tokens=MAX_NEW_TOKENS)

# %% [markdown]
# ## Some of its family, live
#
# With $z(\theta)$ the mean over tokens of what arrives at the target layer, vector $k$ solves
#
# $$\min_{\theta_k} \| z(\theta_k) - z(\theta_0) \| \quad \text{with} \quad
# \theta_k \perp \theta_0, \theta_1, \dots, \theta_{k-1} .$$
#
# The `tm.Run` keeps each vector on disk as it is found: interrupt the cell (the square button), run it
# again, and it goes on where it was.

# %%
family = run.melbo_ortho(f, theta0, N_FAMILY, progress=True)
family.table()

# %%
tm.generate(model, PROMPT, family, max_new_tokens=MAX_NEW_TOKENS)[["vector", "completion"]]

# %% [markdown]
# ### Are they the same direction?
#
# No, by construction. What they *do* is another matter: the first row is $\theta_0$.

# %%
both = torch.cat([theta0.vectors, family.vectors])
with torch.no_grad():
    effects = f.delta(both, positions=slice(1, None))
labels = ["θ₀", *range(len(family))]
tm.plots.cosine_heatmap(
    tm.analysis.cosine_similarity(effects), "Cosines of what they do", labels=labels
)

# %% [markdown]
# ### How near does each come?

# %%
unsteered = float(tm.analysis.effect_distance(f, torch.zeros_like(theta0.vectors), theta0))
tm.plots.distance_curve(family, unsteered, window=max(1, len(family) // 4))

# %% [markdown]
# ## The whole family
#
# In the embedded model, the family of vector 4 ("I'm a 25-year-old software engineer...") ends after 298
# vectors, when nothing of norm 0.1 or more is left that helps. `make results` computed it; here are its
# tables.

# %%
whole = pd.read_csv("results/family_4.csv")
own = whole[whole["kind"] == "family"].reset_index(drop=True)
baselines = {
    "no vector": torch.tensor(
        whole.loc[whole["kind"] == "unsteered", "kl_to_reference"].to_numpy()
    ),
    "random vectors of the same norms": torch.tensor(
        whole.loc[whole["kind"] == "random", "kl_to_reference"].to_numpy()
    ),
}
tm.plots.kl_curve(
    torch.tensor(own["kl_to_reference"].to_numpy()),
    completions=own["completion"].astype(str).tolist(),
    baselines=baselines,
    title="KL(vector ‖ θ₀) of the next token, by place in the family",
)

# %% [markdown]
# Hover over points to read texts. This curve tells little: $\theta_0$ itself is only 0.5 nats from the
# model without a vector in the *next* token, since both begin with "I". The texts tell the two apart:


# %%
def share(words: str, first: int, last: int) -> float:
    return own.loc[first:last, "completion"].str.contains(words, regex=False).mean()


pd.DataFrame(
    [
        {
            "vectors": f"{first} to {min(first + 49, len(own) - 1)}",
            "writes 'year-old'": share("year-old", first, first + 49),
            "speaks of 'AI'": share("AI", first, first + 49),
            "mean norm": own.loc[first : first + 49, "norm"].mean(),
        }
        for first in range(0, len(own), 50)
    ]
).round(2)

# %% [markdown]
# ### The published hypotheses, here
#
# * *The curve starts low, turns mixed, ends high.* Not to be seen here, where low and high are hardly apart;
#   the texts follow such a course. The published curve ends at jailbreaks and refusals, and these texts
#   where there is no vector at all: the last ones are short and do nothing.
# * *They are longer than $\theta_0$, and do nothing at its length.* Longer, yes: 38 to 52 at first, against 12.
#   At its length the first 250 come a quarter of the way (distance 16 to 17 of 23), the last ones none of it.
# * *Vectors that do the same add up.* In twos and threes their texts are a person's, at the members' own
#   length. The distance grows with each that is added, and with ten or twenty the person is gone:

# %%
tm.plots.composition_curves(pd.read_csv("results/composition_4.csv"), "distance")

# %% [markdown]
# ### Does the model use these directions by itself?
#
# Compare texts of people about themselves with impersonal ones, without steering. If a direction meant
# "a person speaks", residuals would differ along it, more than along random ones.

# %%
scanned = pd.read_csv("results/presence_4.csv")
tm.plots.presence_points(scanned)

# %% [markdown]
# None stands out after correcting for their number: six short texts of each kind show no sign that the
# model itself uses these directions. The same test on the live family, with texts of your own:

# %%
PERSONAL = [
    "I grew up on a farm in Ohio with my two brothers, and I moved to the city when I was nineteen.",
    "My name is Dana and I have been a nurse for twelve years; I love my job, but I am tired.",
]
IMPERSONAL = [
    "The Danube is the second longest river of Europe and flows through ten countries.",
    "Add the flour and the eggs, stir until smooth, and bake for forty minutes at medium heat.",
]
tm.analysis.presence(model, family, PERSONAL, IMPERSONAL, layer=SOURCE_LAYER)

# %% [markdown]
# ### What if they may not be long?
#
# The author asked what a penalty on the norm would do: are there vectors of the original's size? It makes them
# shorter, at 0.001 with hardly a loss; from 0.003 on most texts lose the person's traits:

# %%
penalties = pd.read_csv("results/penalties.csv")
penalties["completion"] = penalties["completion"].str.slice(0, 90)
penalties.style.hide(axis="index").format(precision=3)

# %%
shorter = tm.Run("runs/shorter")
short = shorter.melbo_ortho(f, theta0, min(2, N_FAMILY), norm_penalty=0.001, progress=True)
tm.generate(model, PROMPT, short, max_new_tokens=MAX_NEW_TOKENS)[["vector", "completion"]]

# %% [markdown]
# **Next:** `03_quick_hypothesis_test`: a question of your own, answered in ten cells.
