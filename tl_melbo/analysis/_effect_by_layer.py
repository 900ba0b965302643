"""How large is an effect after each layer?"""

from collections.abc import Mapping

import pandas as pd
import torch
from torch import Tensor

from tl_melbo import checks
from tl_melbo.additions import VectorAdditions
from tl_melbo.errors import warn_of_rows
from tl_melbo.model.bridge import Model, check_model, model_name
from tl_melbo.model.tokens import to_tokens
from tl_melbo.reading import map_residuals
from tl_melbo.shapes import checked_slice, shape_checked
from tl_melbo.steering import Vectors, agreed_chat, as_library, as_theta, steering_layer
from tl_melbo.tables import Table


@shape_checked
def effect_by_layer(
    model: Model,
    prompt: str,
    vectors: Vectors | Mapping[str, Vectors],
    *,
    positions: slice = slice(-3, None),
    layer: int | None = None,
    chat: bool | None = None,
    batch_size: int = 32,
) -> pd.DataFrame:
    """How much each vector changes the residual stream, after its own layer and every later one.

        tm.analysis.effect_by_layer(model, prompt, {"MELBO": found, "random": random})

    Args:
        vectors: one library, or several by name, to compare what was found with random ones.
        positions: which tokens of the prompt count.
        chat: None takes the format that the vectors were found with, where any know theirs.

    Returns:
        A row for each vector and layer: vectors, the name ("vectors" of one library); vector, its
        position; layer; norm, of the vector; effect, the norm of what it changes, the mean over
        positions, in units of the residual stream. Vectors with effects that are not finite are
        left out, with a warning.

    Raises:
        ValueError: no vectors, another width, no layer known, positions that miss the prompt.
    """
    check_model(model)
    checks.at_least(1, batch_size=batch_size)
    named = dict(vectors) if isinstance(vectors, Mapping) else {"vectors": vectors}
    if not named:
        raise ValueError('vectors: none given; pass a library, or {"MELBO": found}')
    stories = [getattr(some, "story", {}) for some in named.values()]
    tokens = to_tokens(model, prompt, agreed_chat(stories, chat))
    own = [*range(tokens.shape[1])[checked_slice(positions)]]
    if not own:
        raise ValueError(f"positions={positions}: none of the prompt's {tokens.shape[1]} tokens")
    places = {name: steering_layer(model, some, layer) for name, some in named.items()}
    frames = []
    for name, some in named.items():
        theta, place = as_theta(model, as_library(some)), places[name]
        layers = list(range(place, int(model.cfg.n_layers)))
        rows = VectorAdditions.of(torch.cat([theta, torch.zeros_like(theta[:1])]), place)
        streams = map_residuals(model, tokens, rows, layers, Tensor.float, batch_size, own)
        sizes = (streams[:-1] - streams[-1]).norm(dim=-1).mean(-1).cpu()
        bad = ~sizes.isfinite().all(-1)
        what = f"the residual stream of {model_name(model)}, steered by {name!r},"
        warn_of_rows(bad.tolist(), what, "they are left out")
        columns = {"vector": range(len(theta)), "norm": theta.norm(dim=-1).cpu().numpy()}
        wide = pd.DataFrame(sizes.numpy(), columns=layers).assign(**columns, vectors=name)
        long = wide[~bad.numpy()].melt(["vectors", "vector", "norm"], layers, "layer", "effect")
        frames.append(long.sort_values("vector", kind="stable"))
    order = ["vectors", "vector", "norm", "layer", "effect"]
    return Table(pd.concat(frames, ignore_index=True)[order].astype({"layer": int}))
