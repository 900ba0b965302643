"""Do they add up? Means and sums of vectors that each do the same."""

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor

from tl_melbo.activation_map import ActivationMap
from tl_melbo.analysis._distance import effect_distance
from tl_melbo.generation import generate
from tl_melbo.model.bridge import Model
from tl_melbo.probability import LogProbs, kl_from_log_probs
from tl_melbo.reading import map_next_token, next_token_log_probs, warn_of_log_probs
from tl_melbo.shapes import Float, Theta, shape_checked
from tl_melbo.steering import Reference, Vectors, as_library, as_theta, check_place, one_vector

if TYPE_CHECKING:
    import pandas as pd

Combination = Literal["mean", "sum"]
Scaling = Literal["raw", "reference norm", "mean norm"]

# Each is written with, several times; nobody reads more.
MOST_SUBSETS = 1000


class _Composition(NamedTuple):
    members: tuple[int, ...]
    subset: Literal["first", "random"]
    combination: Combination
    scaling: Scaling
    theta: Tensor


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
) -> "pd.DataFrame":
    """Add vectors up, the first k of them and random subsets, and see whether they still work.

    Each subset gives its mean and its sum, raw, rescaled to the reference's norm, and rescaled to
    the mean norm of its members. (Rescaled, mean and sum are the same vector; it runs once.)

    Args:
        model: the TransformerLens model that `f` was made from.
        f: the activation map that distances are measured in; vectors are added at its source.
        vectors: the library, in order.
        reference: exactly one vector to compare with, theta0 of a MELBO-ortho family for example.
        sizes: how many vectors to add up; sizes beyond the library are left out.
        n_random_subsets: how many random subsets of each size, all different; fewer where there
            are no more, and none of the whole library.
        seed: for the random subsets.
        prompt: where KL and completion are taken; None for the first prompt of `f`.
        max_new_tokens: the most tokens to write.
        chat: format the prompt as chat; None does as `f` does.

    Returns:
        One row a composition. size; members, positions in `vectors`; subset, "first" or "random";
        combination, "mean" or "sum"; scaling, "raw", "reference norm" or "mean norm"; norm, in
        units of the residual stream; kl_to_reference, KL(P_composition || P_reference), and
        kl_to_unsteered, in nats, of the next token; distance, |z - z_reference| with z the mean
        over positions of f(x + theta), of all prompts of `f` together; completion. What needs a
        reference is NaN, or missing, without one. Vectors that cancel out stay zero at any scaling.

    Raises:
        ValueError: no vectors; more or fewer than one reference; more than 1,000 random subsets of
            a size; a size below 1, or none that fits; another model or layer than that of `f`; as
            `generate` does.

    Source: Jacob G-W 2024, "I found >800 orthogonal 'write code' steering vectors".
    """
    from tl_melbo.tables import Table

    library = as_library(vectors)
    check_place(model, f, library, "vectors")
    theta = as_theta(model, library)
    start = None if reference is None else one_vector(reference, "reference")
    if start is not None:
        check_place(model, f, start, "reference")
    start_theta = None if start is None else as_theta(model, start)
    subsets = _subsets(len(theta), _checked_sizes(sizes, len(theta)), n_random_subsets, seed)
    rows = [
        _Composition(members, subset, combination, scaling, combined)
        for members, subset in subsets
        for combination, scaling, combined in _combinations(theta[list(members)], start_theta)
    ]
    # Many rows are one and the same vector; each is run once.
    distinct, which = torch.stack([row.theta for row in rows]).unique(dim=0, return_inverse=True)
    prompt = f.prompts[0] if prompt is None else prompt
    chat = f.chat if chat is None else chat
    to_reference, to_unsteered = _divergences(
        model, prompt, distinct, start_theta, f.source_layer, chat
    )
    texts = generate(
        model, prompt, distinct, f.source_layer, max_new_tokens=max_new_tokens, chat=chat
    )["completion"]
    distances = (
        torch.full((len(distinct),), torch.nan, dtype=torch.float32)
        if start is None
        else effect_distance(f, distinct, start)
    )
    return Table(
        {
            "size": [len(row.members) for row in rows],
            "members": [row.members for row in rows],
            "subset": [row.subset for row in rows],
            "combination": [row.combination for row in rows],
            "scaling": [row.scaling for row in rows],
            "norm": [float(row.theta.norm()) for row in rows],
            "kl_to_reference": to_reference[which].numpy(),
            "kl_to_unsteered": to_unsteered[which].numpy(),
            "distance": distances[which].numpy(),
            "completion": [texts[i] for i in which.tolist()],
        }
    )


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
    n_vectors: int, sizes: list[int], n_random: int, seed: int
) -> Iterator[tuple[tuple[int, ...], Literal["first", "random"]]]:
    if not 0 <= n_random <= MOST_SUBSETS:
        raise ValueError(f"n_random_subsets={n_random}: allowed are 0 to {MOST_SUBSETS}")
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
    members: Theta, reference: Theta | None
) -> Iterator[tuple[Combination, Scaling, Tensor]]:
    total = members.sum(0)
    mean_norm = members.norm(dim=-1).mean()
    for combination in ("mean", "sum"):
        yield combination, "raw", total / len(members) if combination == "mean" else total
        if reference is not None:
            yield combination, "reference norm", _at_norm(total, reference.norm())
        yield combination, "mean norm", _at_norm(total, mean_norm)


def _at_norm(theta: Tensor, norm: Tensor) -> Tensor:
    size = theta.norm()
    return theta * (norm / size) if size > 0 else theta


def _divergences(
    model: Model,
    prompt: str,
    theta: Theta,
    reference: Theta | None,
    layer: int,
    chat: bool,
) -> tuple[Float[Tensor, "vector"], Float[Tensor, "vector"]]:
    """KL to the reference (NaN without one), and to the unsteered model."""
    # A row of zeros is the unsteered model.
    unsteered = torch.zeros_like(theta[:1])
    others = unsteered if reference is None else torch.cat([reference, unsteered])
    log_others = next_token_log_probs(model, prompt, others, layer, chat=chat)

    def measure(log_probs: LogProbs) -> Tensor:
        return torch.stack(
            [kl_from_log_probs(log_probs, other.expand_as(log_probs)) for other in log_others], 1
        )

    kl = map_next_token(model, prompt, theta, layer, measure, chat=chat)
    warn_of_log_probs(model, prompt, layer, kl[:, -1].isnan())
    return torch.full_like(kl[:, 0], torch.nan) if reference is None else kl[:, 0], kl[:, -1]
