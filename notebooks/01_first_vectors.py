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
# A language model keeps what it is thinking, at every token, in one long list of numbers: the
# **residual stream**. Each block reads it and adds something to it. A **steering vector** is a
# direction that *we* add, after one block, at every token. Most directions do nothing. A few make the
# model somebody else.
#
# This notebook finds some, without telling the search what to look for. It takes a few minutes on a
# laptop.

# %% tags=["parameters"]
MODEL = None  # None is the embedded SmolLM2-135M-Instruct; or a hub id, a folder, a .gguf file
PROMPT = "Tell me about yourself."
SOURCE_LAYER, TARGET_LAYER = 8, 16  # for another model: about a quarter and half of its depth
RADIUS = 12.0  # how long the vectors are; see below
N_VECTORS = 16
MAX_NEW_TOKENS = 30
SCALES = [0.25, 0.5, 1.0, 2.0, 3.0, 4.0]

# %%
import pandas as pd
import plotly.express as px
import torch

import tl_melbo as tm

model = tm.load_model(MODEL)

# %% [markdown]
# ## A random direction does nothing
#
# Without a vector the model introduces itself. With a random vector of length `RADIUS` it does nearly
# the same: a space of hundreds of dimensions is mostly directions that no later block listens to.

# %%
generator = torch.Generator().manual_seed(0)
directions = torch.nn.functional.normalize(torch.randn(3, model.cfg.d_model, generator=generator))
random = tm.SteeringVectors.from_tensor(RADIUS * directions, source_layer=SOURCE_LAYER)

writing = {"chat": True, "max_new_tokens": MAX_NEW_TOKENS}
tm.generate(model, PROMPT, **writing)

# %%
tm.generate(model, PROMPT, random, **writing)

# %% [markdown]
# ## A vector that later blocks listen to
#
# **MELBO** looks for directions that change a *later* layer as much as possible. Call $f$ what the
# blocks between do to the residual stream; on a sphere of radius $R$ it climbs
#
# $$\max_{\|\theta\| = R} \; \sum_{\text{positions}} \| f(x + \theta) - f(x) \|^2 .$$
#
# No labels, no examples, only the prompt. Each vector is orthogonal to all before it, so that each
# is something new.

# %%
f = tm.ActivationMap.from_prompts(
    model, PROMPT, source_layer=SOURCE_LAYER, target_layer=TARGET_LAYER, chat=True
)
run = tm.Run("runs/first_vectors")  # keeps each vector as it comes: interrupt it, and run it again
found = run.melbo(f, N_VECTORS, radius=RADIUS, progress=True)
found

# %%
texts = tm.generate(model, PROMPT, found, max_new_tokens=MAX_NEW_TOKENS)
texts

# %% [markdown]
# **Read them all.** Personas, a leaked system prompt, a film that does not exist, nonsense. Which ones
# are interesting is for you to say; the search only knows that they change something.
#
# ## Why measure at a later layer?
#
# At the source layer itself every vector of length $R$ has an effect of exactly $R$: there is nothing to
# climb. Each block that follows stretches some directions and shrinks others, and the gap between what
# was found and what is random opens.

# %%
rows = []
last_three = slice(-3, None)
for target in sorted({SOURCE_LAYER + 1, (SOURCE_LAYER + TARGET_LAYER) // 2, TARGET_LAYER,
                      min(TARGET_LAYER + 4, model.cfg.n_layers - 1)}):  # fmt: skip
    to_there = tm.ActivationMap.from_prompts(model, PROMPT, SOURCE_LAYER, target, chat=True)
    for name, some in [("random", random), ("MELBO", found[:3])]:
        with torch.no_grad():
            sizes = to_there.delta(some.vectors, positions=last_three).norm(dim=-1)
        mean = float(sizes[:, to_there.position_mask(last_three)].mean())
        rows.append({"layer": target, "vectors": name, "effect": mean})
rows += [{"layer": SOURCE_LAYER, "vectors": name, "effect": RADIUS} for name in ("random", "MELBO")]

px.line(
    pd.DataFrame(rows).sort_values("layer"), x="layer", y="effect", color="vectors", markers=True,
    color_discrete_sequence=["#0072b2", "#d55e00"], template="plotly_white", width=640, height=380,
    labels={"layer": "measured after block", "effect": "mean change (residual units)"},
    title="What is left of a vector of one length",
)  # fmt: skip

# %% [markdown]
# ## How long should a vector be?
#
# Too short and nothing happens, too long and the text falls apart. Here are six vectors at several
# multiples of their length: how far the next token's distribution moves (KL, in nats), and how much the
# text repeats itself. Shaded is where, for the median vector, it is changed and does not repeat itself.
# Whether it makes *sense* there, only reading tells: below, one vector from nothing to gibberish.

# %%
swept = tm.analysis.scale_sweep(model, PROMPT, found[:6], SCALES, max_new_tokens=MAX_NEW_TOKENS)
tm.plots.scale_curves(swept)

# %%
ONE = min(4, len(found) - 1)  # a person, in the embedded model's library; put your own choice here
alone = tm.analysis.scale_sweep(model, PROMPT, found[ONE], SCALES, max_new_tokens=MAX_NEW_TOKENS)
alone[["scale", "norm", "kl", "repetition", "completion"]]

# %% [markdown]
# ## The other way round
#
# A vector has a negative. In large models it can do the opposite: the negative of a vector against refusals
# made one refuse harmless requests. Here most of the negatives do no more than the random vectors did.

# %%
tm.generate(model, PROMPT, -found, max_new_tokens=MAX_NEW_TOKENS)

# %% [markdown]
# ## A library
#
# The vectors are orthogonal by construction. Their *effects*, at the target layer, need not be: where
# two point the same way, two different vectors do the same thing.

# %%
tm.plots.cosine_heatmap(tm.analysis.cosine_similarity(found), "Cosines of the vectors")

# %%
with torch.no_grad():
    effects = f.delta(found.vectors, positions=last_three)
tm.plots.cosine_heatmap(tm.analysis.cosine_similarity(effects), "Cosines of what they do")

# %% [markdown]
# ## Choosing one, and keeping it
#
# Take the one whose text you want to understand. Which tokens of an ordinary text point along it, in the
# model that nobody steers? (Blue along, red against.)

# %%
one = found[ONE]
tm.plots.token_presence(
    model, one, "I am a software engineer from Texas. The recipe needs two eggs and some flour."
)

# %%
with tm.steered(model, one):  # any TransformerLens call inside
    print(
        model.generate("My name is", max_new_tokens=MAX_NEW_TOKENS, do_sample=False, verbose=False)
    )

# %%
one.save("one.safetensors")
tm.SteeringVectors.load("one.safetensors")

# %% [markdown]
# **Next:** `02_orthogonal_family` asks whether this vector is the only one that does what it does.
