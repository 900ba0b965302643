"""Do they add up? Means and sums of vectors that each do the same."""

import math
from collections.abc import Iterator, Sequence

import pandas as pd
import torch
from torch import Tensor

from tl_melbo import checks
from tl_melbo.activation_map import ActivationMap
from tl_melbo.analysis._divergence import comparison
from tl_melbo.model.bridge import Model
from tl_melbo.shapes import Theta, shape_checked
from tl_melbo.steering import Reference, Vectors, as_library, one_vector
from tl_melbo.tables import Table

# Each is written with, several times; nobody reads more.
MOST_SUBSETS = 1000
_KIND = ["size", "members", "subset", "combination", "scaling"]
_MEASURED = ["norm", "kl_to_reference", "kl_to_unsteered", "distance", "completion"]


@shape_checked
def composition(
    model: Model,
    f: ActivationMap,
    vectors: Vectors,
    reference: Reference | None = None,
    sizes: Sequence[int] = (2, 3, 10, 20),
    *,
    n_random_subsets: int = 3,
    seed: int = 0,
    prompt: str | None = None,
    max_new_tokens: int = 50,
    chat: bool | None = None,
) -> pd.DataFrame:
    """Add vectors up, the first k of them and random subsets, and see whether they still work.

    Each subset gives its mean and its sum: raw, rescaled to the reference's norm, and rescaled to
    the mean norm of its members. (Rescaled, mean and sum are the same vector; it runs once.)

    Args:
        f: the activation map that distances are measured in; vectors are added at its source.
        reference: exactly one vector to compare with, theta0 of a MELBO-ortho family for example.
        sizes: how many vectors to add up; sizes beyond the library are left out.
        n_random_subsets: how many random subsets of each size, all different; fewer where there
            are no more, at most 1,000.
        prompt: where KL and completion are taken; None for the first prompt of `f`.

    Returns:
        One row a composition. size; members, positions in `vectors`; subset, "first" or "random";
        combination, "mean" or "sum"; scaling, "raw", "reference norm" or "mean norm"; and norm,
        kl_to_reference, kl_to_unsteered, distance, completion as in `family`. What needs a
        reference is NaN, or missing, without one. Vectors that cancel out stay zero at any scaling.

    Raises:
        ValueError: no vectors; not exactly one reference; a number out of its range, or no size
            that fits; another model or layer than that of `f`; as `generate` does.
    """
    library = as_library(vectors)
    start = None if reference is None else one_vector(reference, "reference")
    checks.between(0, MOST_SUBSETS, "how many", n_random_subsets=n_random_subsets)
    compare = comparison(model, f, library, start, prompt, chat, max_new_tokens)
    sizes = _checked_sizes(sizes, len(library))
    norm = None if start is None else start.vectors.norm()
    kinds, rows = [], []
    for members, subset in _subsets(len(library), sizes, n_random_subsets, seed):
        for combination, scaling, theta in _combinations(library.vectors[list(members)], norm):
            kinds.append((len(members), members, subset, combination, scaling))
            rows.append(theta)
    # Many rows are one and the same vector; each is run once.
    distinct, which = torch.stack(rows).unique(dim=0, return_inverse=True)
    measured = compare(distinct, True).iloc[which.tolist()].reset_index(drop=True)
    return Table(pd.concat([pd.DataFrame(kinds, columns=_KIND), measured[_MEASURED]], axis=1))


def _checked_sizes(sizes: Sequence[int], n_vectors: int) -> list[int]:
    below = [size for size in sizes if size < 1]
    if below:
        raise ValueError(f"sizes={tuple(sizes)}: {below[0]} is below 1; give how many to add up")
    fitting = [size for size in dict.fromkeys(sizes) if size <= n_vectors]
    if not fitting:
        raise ValueError(
            f"sizes={tuple(sizes)}: none fits a library of {n_vectors} vectors; allowed are 1 to "
            f"{n_vectors}"
        )
    return fitting


def _subsets(
    n_vectors: int, sizes: Sequence[int], n_random: int, seed: int
) -> Iterator[tuple[tuple[int, ...], str]]:
    generator = torch.Generator().manual_seed(seed)
    for size in sizes:
        first = tuple(range(size))
        yield first, "first"
        seen = {first}
        n_there = min(1 + n_random, math.comb(n_vectors, size))
        while len(seen) < n_there:
            drawn = torch.randperm(n_vectors, generator=generator)[:size]
            members = tuple(drawn.sort().values.tolist())
            if members not in seen:
                seen.add(members)
                yield members, "random"


def _combinations(
    members: Theta, reference_norm: Tensor | None
) -> Iterator[tuple[str, str, Tensor]]:
    total = members.sum(0)
    size = total.norm()
    norms = {"reference norm": reference_norm, "mean norm": members.norm(dim=-1).mean()}
    for combination, raw in (("mean", total / len(members)), ("sum", total)):
        yield combination, "raw", raw
        for scaling, norm in norms.items():
            if norm is not None:
                yield combination, scaling, total * (norm / size) if size > 0 else total
