"""How far is what a vector does from what another does, at the target layer?"""

import torch
from torch import Tensor

from tl_melbo.activation_map import ActivationMap
from tl_melbo.errors import NotFinite, place, warn_of_rows
from tl_melbo.memory import map_batches
from tl_melbo.shapes import Float, shape_checked
from tl_melbo.steering import (
    Reference,
    Vectors,
    as_library,
    as_theta,
    check_place,
    one_vector,
)


@shape_checked
@torch.no_grad()
def effect_distance(
    f: ActivationMap, vectors: Vectors, reference: Reference
) -> Float[Tensor, "vector"]:
    """The distance |z - z_reference| that MELBO-ortho makes small.

    z is the mean over positions of f(x + theta); the distance is over all prompts of `f` together.

    Args:
        f: the activation map.
        vectors: which vectors to measure; a row of zeros is the unsteered model.
        reference: exactly one vector, theta0 for example.

    Returns:
        In units of the residual stream, float32, on the CPU.

    Raises:
        ValueError: no vectors; more or fewer than one reference; another model's width or another
            layer than those of `f`.
        NotFinite: the residual stream is not finite under the reference, or any vector.

    Warns:
        UserWarning: it is not finite under some vectors; their distances are NaN.

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
