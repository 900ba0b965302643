"""Are they the same direction, and have they the same effect? Cosines and distances."""

import torch
from torch import Tensor

from tl_melbo import checks
from tl_melbo.activation_map import ActivationMap
from tl_melbo.errors import NotFinite, place, warn_of_rows
from tl_melbo.geometry import normalise
from tl_melbo.memory import map_batches
from tl_melbo.shapes import Delta, Float, Theta, shape_checked
from tl_melbo.steering import Reference, Vectors, as_library, as_theta, check_place, one_vector
from tl_melbo.vectors import SteeringVectors

VectorsOrEffects = SteeringVectors | Theta | Delta
# How many, and how wide, is for the function to compare, not for the axes' names.
Other = SteeringVectors | Float[Tensor, "other _"] | Float[Tensor, "other _ _ _"]


@shape_checked
def cosine_similarity(
    vectors: VectorsOrEffects, other: Other | None = None
) -> Float[Tensor, "vector other"]:
    """Cosine of the angle between every pair: of vectors, or of effects that `f.delta` gave.

    Args:
        other: what to compare with; None compares `vectors` with themselves.

    Returns:
        Row i, column j: vector i against vector j of `other`, from -1 to 1. Summed in float64;
        float32, or float64 where the input is; on the CPU.

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
    """The distance |z - z_reference| that MELBO-ortho makes small.

    z is the mean over positions of f(x + theta); the distance is over all prompts of `f` together.

    Returns:
        In units of the residual stream, float32, on the CPU; NaN, with a warning, where the
        residual stream is not finite.

    Raises:
        ValueError: no vectors; not exactly one reference; another width or layer than those of `f`.
        NotFinite: the residual stream is not finite under the reference, or any vector.

    Source: Jacob G-W 2024, "I found >800 orthogonal 'write code' steering vectors".
    """
    library, start = as_library(vectors), one_vector(reference, "reference")
    check_place(f.model, f, library, "vectors")
    check_place(f.model, f, start, "reference")
    theta = torch.cat([as_theta(f.model, start), as_theta(f.model, library)])
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
