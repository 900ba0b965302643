"""Random vectors: the baseline of every other method."""

from collections.abc import Iterator

import torch

from tl_melbo import checks
from tl_melbo.discovery._calibration import Radius, chosen_radius
from tl_melbo.discovery._map import EffectMap
from tl_melbo.discovery._search import Part, Search, method
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
    """Draw vectors of one norm in random directions, uniformly on the sphere: a baseline.

        random = tm.random_vectors(f, 32, radius=float(found.norms[0]))

    Args:
        seed: vector k depends on the seed and k alone.

    Source: the baseline of Mack & Turner 2024.
    """
    checks.seed(seed)
    radius, calibration = chosen_radius(f, radius, previous)

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
