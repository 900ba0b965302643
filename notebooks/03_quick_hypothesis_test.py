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
# # A quick hypothesis test
#
# You have an afternoon and a question about a vector. Here are three, each answered in a few cells:
#
# 1. Does this vector do the same on *other prompts*?
# 2. Is the *contrastive* vector, the difference of means that needs labels, among the ones found without?
# 3. Does *averaging* vectors that do the same give one that does it, too?
#
# Put your own prompts and texts in, and run it again.

# %% tags=["parameters"]
MODEL = None  # None is the embedded SmolLM2-135M-Instruct; or a hub id, a folder, a .gguf file
PROMPT = "Tell me about yourself."
SOURCE_LAYER, TARGET_LAYER = 8, 16
RADIUS = 12.0
N_VECTORS = 16
CHOSEN = 4  # which vector of the library the questions are about
N_FAMILY = 3
MAX_NEW_TOKENS = 30

# %%
import math

import torch

import tl_melbo as tm

model = tm.load_model(MODEL)
f = tm.ActivationMap.from_prompts(model, PROMPT, SOURCE_LAYER, TARGET_LAYER, chat=True)
run = tm.Run(
    "runs/hypothesis"
)  # keeps each vector as it comes; with other settings, another folder
found = run.melbo(f, N_VECTORS, radius=RADIUS, progress=True)
chosen = found[min(CHOSEN, N_VECTORS - 1)]
tm.generate(model, PROMPT, chosen, scales=[1, -1], max_new_tokens=MAX_NEW_TOKENS)

# %% [markdown]
# ## 1. Does it do the same on other prompts?
#
# **Hypothesis:** the vector means "a person speaks", so it matters where the model talks about itself,
# and not where it does not. KL is how far the next token's distribution moves, in nats.

# %%
OTHERS = [
    "What did you do last weekend?",
    "Where did you grow up?",
    "Who made you?",
    "Write a poem about the sea.",
    "How do I bake bread?",
]
moved = tm.analysis.transfer(model, chosen, OTHERS, max_new_tokens=MAX_NEW_TOKENS)
moved[["prompt", "kl", "completion", "unsteered_completion"]]

# %% [markdown]
# Compare with random vectors of the same length before you call a KL large:

# %%
random = tm.SteeringVectors.from_tensor(
    RADIUS * torch.nn.functional.normalize(
        torch.randn(10, model.cfg.d_model, generator=torch.Generator().manual_seed(0))
    ),
    source_layer=SOURCE_LAYER,
)  # fmt: skip
for prompt in OTHERS:
    ours = float(tm.analysis.kl_divergence(model, prompt, chosen, chat=True))
    theirs = tm.analysis.kl_divergence(model, prompt, random, chat=True)
    print(f"{ours:6.3f} | random {theirs.median():.3f}, at most {theirs.max():.3f} | {prompt}")

# %% [markdown]
# **In the embedded model:** not as supposed. Two questions about oneself have a person's answer without a
# vector, too; at "Who made you?" the AI is gone, but a film is in its place; the poem stays a poem, and for
# the recipe the next token moves less than under one of ten random vectors.
#
# ## 2. Is the contrastive vector among them?
#
# With labels there is a simple way to a vector: the mean residual of texts that show the behaviour, less
# that of texts that do not. **Hypothesis:** one of the found vectors points where it points.

# %%
PERSONAL = [
    "I'm a 25-year-old nurse from Ohio. I have two dogs, and I love hiking with my sister.",
    "My name is Daniel. I grew up on a farm, and I moved to the city when I was nineteen.",
    "I am a teacher and a father of three. On Sundays my family and I go to the lake.",
]
ASSISTANT = [
    "I'm an AI assistant. I can answer questions and help you with many kinds of tasks.",
    "As a language model, I do not have a family or a job, but I can help you write.",
    "I am a digital assistant made to support users and to give accurate information.",
]


def mean_residual(texts):
    """At the source layer, over all tokens but the first, whose residual is an outlier."""
    residuals = tm.ActivationMap.from_prompts(model, texts, SOURCE_LAYER, TARGET_LAYER)
    counted = residuals.position_mask(slice(1, None))
    return residuals.x[counted].mean(0)


contrast = mean_residual(PERSONAL) - mean_residual(ASSISTANT)
contrastive = tm.SteeringVectors.from_tensor(
    RADIUS * torch.nn.functional.normalize(contrast, dim=0), source_layer=SOURCE_LAYER
)
cosines = tm.analysis.cosine_similarity(found, contrastive)[:, 0]
chance = 1 / model.cfg.d_model**0.5
print(f"largest |cosine| {cosines.abs().max():.3f} (vector {int(cosines.abs().argmax())}); "
      f"a random direction has about {chance:.3f}, the largest of {len(found)} about "
      f"{chance * (2 * math.log(2 * len(found))) ** 0.5:.3f}")  # fmt: skip

# %%
tm.generate(model, PROMPT, contrastive, chat=True, scales=[1, 2], max_new_tokens=MAX_NEW_TOKENS)

# %% [markdown]
# Its texts no longer speak of an AI, and in the space of directions it is nearly a stranger to all that were found.
# In the space of *effects* it need not be:

# %%
with torch.no_grad():
    effects = f.delta(torch.cat([found.vectors, contrastive.vectors]), positions=slice(-3, None))
of_effects = tm.analysis.cosine_similarity(effects)[-1, :-1]
print(f"largest |cosine| of effects {of_effects.abs().max():.3f} "
      f"(vector {int(of_effects.abs().argmax())}), "
      f"that with the chosen vector {of_effects[min(CHOSEN, N_VECTORS - 1)]:.3f}")  # fmt: skip

# %% [markdown]
# **In the embedded model** it is nearly one there, too: no cosine is above 0.2.
#
# ## 3. Does averaging work?
#
# **Hypothesis:** vectors that each do what the chosen one does also do it together. A few of its
# orthogonal family, summed and averaged, at their own length and at the chosen one's:

# %%
family = run.melbo_ortho(f, chosen, N_FAMILY, progress=True)
together = tm.analysis.composition(
    model, f, family, chosen, sizes=range(1, N_FAMILY + 1), n_random_subsets=0,
    max_new_tokens=MAX_NEW_TOKENS,
)  # fmt: skip
together[["size", "combination", "scaling", "norm", "distance", "completion"]]

# %%
tm.plots.composition_curves(together, "distance")

# %% [markdown]
# Distance 0 is the chosen vector's own effect, and no vector at all is at

# %%
float(tm.analysis.effect_distance(f, torch.zeros(1, model.cfg.d_model), chosen))

# %% [markdown]
# **In the embedded model** each member comes near, at three times the chosen length. At that length their
# mean is farther away the more there are, though its text is still a person's; at the *chosen* length the
# mean gets nearer with each member, to about half of the way. So: a little.
#
# Whatever you find: read the texts before you trust a number.
