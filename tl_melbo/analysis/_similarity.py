"""Are they the same? Cosines of directions, distances of effects, divergence of the next token."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from tl_melbo import checks, steering
from tl_melbo.activation_map import ActivationMap
from tl_melbo.additions import VectorAdditions
from tl_melbo.errors import NotFinite, place, warn_of_rows
from tl_melbo.geometry import normalise, random_sphere
from tl_melbo.memory import map_batches
from tl_melbo.model.bridge import Model
from tl_melbo.probability import LogProbs, kl_from_log_probs
from tl_melbo.reading import map_next_token, next_token_log_probs, warn_of_log_probs
from tl_melbo.shapes import Delta, Float, Theta, shape_checked
from tl_melbo.steering import Reference, Vectors
from tl_melbo.vectors import SteeringVectors

Direction = Literal["to_reference", "from_reference"]
VectorsOrEffects = SteeringVectors | Theta | Delta
Other = SteeringVectors | Float[Tensor, "other _"] | Float[Tensor, "other _ _ _"]


@shape_checked
def cosine_similarity(
    vectors: VectorsOrEffects, other: Other | None = None
) -> Float[Tensor, "vector other"]:
    """Cosine of every pair of vectors, or of effects that `f.delta` gave; of `vectors` if no other.

    Float32, or float64 where the input is; on the CPU.

    Raises:
        ValueError: a vector is zero or not finite; the two differ in width.
    """
    rows = _flat(vectors, "vectors")
    columns = rows if other is None else _flat(other, "other")
    checks.width(columns, rows.shape[1], "other", "vectors")
    dtype = torch.promote_types(torch.promote_types(rows.dtype, columns.dtype), torch.float32)
    cosines = normalise(rows.double()) @ normalise(columns.double()).T
    return cosines.clamp(-1.0, 1.0).to(dtype)


def _flat(vectors: VectorsOrEffects | Other, argument: str) -> Theta:
    tensor = vectors.vectors if isinstance(vectors, SteeringVectors) else vectors
    return checks.directions(tensor.detach().cpu().flatten(1), argument)


@shape_checked
@torch.no_grad()
def effect_distance(
    f: ActivationMap, vectors: Vectors, reference: Reference
) -> Float[Tensor, "vector"]:
    """The distance |z - z_reference| that MELBO-ortho makes small; z is f's mean over positions.

    Over all prompts of `f` together, in units of the residual stream, float32, on the CPU; NaN,
    with a warning, where the residual stream is not finite.

    Raises:
        ValueError: no vectors; not exactly one reference; another width or layer than those of `f`.
        NotFinite: the residual stream is not finite under the reference, or any vector.

    Source: Jacob G-W 2024, "I found >800 orthogonal 'write code' steering vectors".
    """
    library, start = steering.as_library(vectors), steering.one_vector(reference, "reference")
    steering.check_place(f.model, f, library, "vectors")
    steering.check_place(f.model, f, start, "reference")
    theta = torch.cat([steering.as_theta(f.model, start), steering.as_theta(f.model, library)])
    counts = f.mask.sum(-1, keepdim=True)
    # Averaged batch by batch: effects at every position of every vector would fill the memory.
    means, _ = map_batches(
        lambda batch: f.delta(batch).sum(2) / counts, theta.to(f.x.device), f.vectors_at_once(False)
    )
    means = torch.cat(means)
    distances = (means[1:] - means[:1]).flatten(1).norm(dim=-1).float().cpu()
    bad = ~distances.isfinite()
    if bad.any():
        what = f"the residual stream of {place(f.story())}"
        if not means[0].isfinite().all():
            raise NotFinite(f"reference: {what} is not finite under it; use a shorter one")
        warn_of_rows(bad.tolist(), what, "their distances are NaN")
    return distances.masked_fill(bad, torch.nan)


@shape_checked
def kl_divergence(
    model: Model,
    prompt: str,
    vectors: Vectors,
    reference: Reference | None = None,
    direction: Direction = "to_reference",
    layer: int | None = None,
    chat: bool | None = None,
    *,
    batch_size: int = 32,
) -> Float[Tensor, "vector"]:
    """How far each vector moves the distribution of the token after the prompt.

    In nats, float32, on the CPU; NaN, with a warning, where the logits are not finite.

    Args:
        reference: what to compare with; None for the unsteered model.
        direction: "to_reference" is KL(P_vector || P_reference), as in the published plots;
            "from_reference" is the reverse.

    Raises:
        ValueError: not exactly one reference; as `next_token_log_probs` does.
        NotFinite: the logits are not finite under the reference, or any vector.

    Source: Jacob G-W 2024, "I found >800 orthogonal 'write code' steering vectors".
    """
    checks.at_least(1, batch_size=batch_size)
    chat = steering.as_chat(vectors, chat)
    own_layer = steering.steering_layer(model, vectors, layer)
    if reference is not None:
        checks.exactly_one(reference, "reference")
    if layer is None and isinstance(reference, SteeringVectors):
        layer = reference.source_layer
    # A tensor does not know where it belongs: where the others do.
    layer = own_layer if layer is None else layer
    log_reference = next_token_log_probs(model, prompt, reference, layer, chat=chat)
    theta, measure = steering.as_theta(model, vectors), kl_to(log_reference, direction)
    options = {"chat": chat, "batch_size": batch_size}
    rows = VectorAdditions.of(theta, own_layer)
    kl = map_next_token(model, prompt, rows, measure, **options)[:, 0]
    warn_of_log_probs(model, prompt, rows, kl.isnan())
    return kl


def kl_to(
    log_references: LogProbs, direction: Direction = "to_reference"
) -> Callable[[LogProbs], Tensor]:
    """For `map_next_token`: the divergence of each row from each reference, [row, reference]."""

    def measure(log_probs: LogProbs) -> Tensor:
        order = slice(None, None, 1 if direction == "to_reference" else -1)
        pairs = [(log_probs, each.expand_as(log_probs))[order] for each in log_references]
        return torch.stack([kl_from_log_probs(*pair) for pair in pairs], 1)

    return measure


@shape_checked
def kl_baselines(
    model: Model,
    prompt: str,
    vectors: Vectors,
    reference: Reference,
    direction: Direction = "to_reference",
    layer: int | None = None,
    chat: bool | None = None,
    *,
    seed: int = 0,
) -> dict[str, Float[Tensor, "vector"]]:
    """What to compare `kl_divergence` with, in nats; errors are those of `kl_divergence`.

    "unsteered" is one number, "random vectors of the same norms" one for each vector.
    """
    chat, layer = steering.as_chat(vectors, chat), steering.steering_layer(model, vectors, layer)
    theta = steering.as_theta(model, vectors)

    def kl(rows: Theta) -> Tensor:
        return kl_divergence(model, prompt, rows, reference, direction, layer, chat)

    name = "random vectors of the same norms"
    return {"unsteered": kl(torch.zeros_like(theta[:1])), name: kl(random_like(theta, seed))}


def random_like(theta: Theta, seed: int) -> Theta:
    """Vectors in random directions, each of the norm of the one it stands for."""
    generator = torch.Generator().manual_seed(seed)
    units = random_sphere(len(theta), theta.shape[1], generator=generator)
    return units * theta.cpu().norm(dim=-1, keepdim=True)
