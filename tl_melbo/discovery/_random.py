"""Random vectors: what every other method is to be held against."""

from collections.abc import Iterator

import torch

from tl_melbo import checks
from tl_melbo.discovery._calibration import Radius, calibrate_radius, check_radius, chosen_radius
from tl_melbo.discovery._protocol import EffectMap, typical_norm
from tl_melbo.discovery._search import Part, Search, check_count, method
from tl_melbo.geometry import numbered_sphere
from tl_melbo.vectors import SteeringVectors


@method
def random_vectors(
    f: EffectMap,
    n_vectors: int = 32,
    radius: Radius = "auto",
    seed: int = 0,
    *,
    previous: SteeringVectors | None = None,
    progress: bool = False,
) -> Search:
    """Draw vectors of one norm in random directions, uniformly on the sphere.

        random = tm.random_vectors(f, 32, radius=float(found.norms[0]))

    Args:
        f: the activation map; its width and, for "auto", its calibration count.
        n_vectors: how many.
        radius: their L2 norm, in the units of the residual stream; "auto" takes
            `calibrate_radius`.
        seed: of the directions. Vector k depends on the seed and k alone.
        previous: vectors 0 to k-1, all of them; the new ones go on from there.
        progress: show a progress bar.

    Raises:
        ValueError: a number out of its range.
        DifferentSearch: `previous` is not the beginning of this search.

    Source: the baseline of Mack & Turner 2024, "Mechanistically eliciting latent behaviors in
    language models".
    """
    check_radius(radius, typical_norm(f))
    check_count(n_vectors, None, previous)
    checks.seed(seed)
    radius, calibration = chosen_radius(radius, previous, lambda: calibrate_radius(f))

    def find(earlier: torch.Tensor, first: int) -> Iterator[Part]:
        units = numbered_sphere(first + n_vectors, int(f.x.shape[-1]), seed)[first:]
        yield Part(first, (units * radius).float())

    return Search(
        "random_vectors",
        f,
        n_vectors,
        {"radius": radius},
        find,
        previous=previous,
        progress=progress,
        seed=seed,
        about="Each vector points in a random direction: a baseline, not a finding.",
        **calibration,
    )
