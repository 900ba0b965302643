"""How long must a vector be? Vectors at other norms, and what the model does along the way."""

import math
from collections.abc import Sequence
from dataclasses import replace

import pandas as pd
import torch
from torch import Tensor

from tl_melbo import checks, steering
from tl_melbo.analysis._coherence import repetition_of
from tl_melbo.analysis._similarity import kl_to
from tl_melbo.generation import generate
from tl_melbo.model.bridge import Model
from tl_melbo.probability import LogProbs
from tl_melbo.reading import map_next_token, next_token_log_probs
from tl_melbo.shapes import shape_checked
from tl_melbo.steering import Reference, Vectors, as_library
from tl_melbo.vectors import SteeringVectors

DEFAULT_SCALES = (-2.0, -1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0)


@shape_checked
def rescale(vectors: Vectors, norm: float | Reference) -> SteeringVectors:
    """Each vector at another norm, in its own direction: `rescale(ortho, 12.0)`.

    Args:
        norm: in units of the residual stream; or exactly one vector, to take its norm.

    Returns:
        A new library; the column "scale" tells by how much each was stretched. What was measured of
        the vectors at their old norm is left out.

    Raises:
        ValueError: no vectors, or one without a direction; a norm that is not positive and finite.

    Source: Jacob G-W 2024, "I found >800 orthogonal 'write code' steering vectors", where vectors
    rescaled to |theta0| lose their effect.
    """
    library = as_library(vectors)
    known = isinstance(norm, int | float)
    length = float(norm) if known else float(steering.one_vector(norm, "norm").norms[0])
    checks.positive(norm=length)
    factors = length / checks.directions(library.vectors.double(), "vectors").norm(dim=-1)
    scales = library.columns.get("scale", torch.ones(len(library), dtype=torch.float32)) * factors
    return replace(
        library,
        vectors=library.vectors.double() * factors[:, None],
        columns={"index": library.columns["index"], "scale": scales.float()},
        history=None,
    )


@shape_checked
def scale_sweep(
    model: Model,
    prompt: str,
    vectors: Vectors,
    scales: Sequence[float] = DEFAULT_SCALES,
    *,
    max_new_tokens: int = 50,
    layer: int | None = None,
    chat: bool | None = None,
) -> pd.DataFrame:
    """Stretch, shrink and negate vectors: where is the output changed and still coherent?

    Returns:
        One row a vector and scale. vector, its position in `vectors`; scale, 0 for the unsteered
        model; norm, in units of the residual stream; kl, KL(P_vector || P_unsteered) of the next
        token, and entropy of that token, in nats; repetition, see `repetition`; completion.

    Raises:
        ValueError: no vectors, no scales or scales that are not finite; as `generate` does.
    """
    library = as_library(vectors)
    theta = steering.as_theta(model, library)
    if not scales or not all(math.isfinite(scale) for scale in scales):
        raise ValueError(f"scales={tuple(scales)}: at least one, and finite numbers only")
    frame = generate(
        model, prompt, library, layer, scales=scales, max_new_tokens=max_new_tokens, chat=chat
    ).drop(columns="prompt")
    # Scaled by zero, a vector is the unsteered model, and brings its layer and chat format along.
    kl_to_unsteered = kl_to(
        next_token_log_probs(model, prompt, library[0], layer, scale=0.0, chat=chat)
    )
    layer, chat = steering.steering_layer(model, library, layer), steering.as_chat(library, chat)
    # The same order as that of the completions: scale by scale.
    rows = torch.cat([theta * scale for scale in scales])

    def measure(log_probs: LogProbs) -> Tensor:
        entropy = torch.special.entr(log_probs.double().exp()).sum(-1, keepdim=True)
        return torch.cat([kl_to_unsteered(log_probs), entropy.float()], 1)

    kl, entropy = map_next_token(model, prompt, rows, layer, measure, chat=chat).unbind(1)
    frame.insert(2, "norm", rows.norm(dim=-1).cpu().numpy())
    frame.insert(3, "kl", kl.numpy())
    frame.insert(4, "entropy", entropy.numpy())
    frame.insert(5, "repetition", [repetition_of(model, text) for text in frame["completion"]])
    return frame.sort_values("vector", kind="stable", ignore_index=True)
