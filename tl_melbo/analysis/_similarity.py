"""Are they the same direction? Cosine similarity of vectors, or of their effects."""

import torch
from torch import Tensor

from tl_melbo import checks
from tl_melbo.geometry import normalise
from tl_melbo.shapes import Delta, Float, Theta, shape_checked
from tl_melbo.vectors import SteeringVectors

VectorsOrEffects = SteeringVectors | Theta | Delta
# How many, and how wide, is for the function to compare, not for the axes' names.
Other = SteeringVectors | Float[Tensor, "other _"] | Float[Tensor, "other _ _ _"]


@shape_checked
def cosine_similarity(
    vectors: VectorsOrEffects, other: Other | None = None
) -> Float[Tensor, "vector other"]:
    """Cosine of the angle between every pair.

    Args:
        vectors: a library, a matrix of vectors, or effects as `ActivationMap.delta` gives them,
            `[vector, prompt, pos, d_model]`: then each vector's whole effect is one long vector.
        other: what to compare with; None compares `vectors` with themselves.

    Returns:
        Row i, column j: vector i against vector j of `other`, from -1 to 1. Summed in float64;
        float32, or float64 where the input is; on the CPU.

    Raises:
        ValueError: a vector is zero or not finite, so it has no direction; or the two differ in
            width.
    """
    rows = _flat(vectors, "vectors")
    columns = rows if other is None else _flat(other, "other")
    checks.width(columns, rows.shape[1], "other", "vectors")
    units = normalise(rows.double())
    other_units = units if other is None else normalise(columns.double())
    dtype = torch.promote_types(torch.promote_types(rows.dtype, columns.dtype), torch.float32)
    return (units @ other_units.T).clamp(-1.0, 1.0).to(dtype)


def _flat(vectors: VectorsOrEffects | Other, argument: str) -> Theta:
    tensor = vectors.vectors if isinstance(vectors, SteeringVectors) else vectors
    return checks.directions(tensor.detach().cpu().flatten(1), argument)
