"""Vectors of one effect: a MELBO-ortho family beside its baselines, and what its sums do."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from tl_melbo import checks
from tl_melbo.activation_map import ActivationMap
from tl_melbo.additions import VectorAdditions
from tl_melbo.analysis._completions import OnBatch, rescale
from tl_melbo.analysis._similarity import effect_distance, kl_to, random_like
from tl_melbo.generation import generate, in_parts
from tl_melbo.memory import map_batches
from tl_melbo.model.bridge import Model
from tl_melbo.probability import LogProbs
from tl_melbo.reading import map_next_token, next_token_log_probs, warn_of_log_probs
from tl_melbo.shapes import Theta, shape_checked
from tl_melbo.steering import Reference, Vectors, as_library, as_theta, check_place, one_vector
from tl_melbo.tables import Table
from tl_melbo.vectors import SteeringVectors

_BATCH_SIZE = 32
MOST_SUBSETS = 1000
_KIND = ["size", "members", "subset", "combination", "scaling"]
_MEASURED = ["norm", "kl_to_reference", "kl_to_unsteered", "distance", "completion"]


@shape_checked
def family(
    model: Model,
    f: ActivationMap,
    vectors: Vectors,
    reference: Reference,
    *,
    prompt: str | None = None,
    max_new_tokens: int = 50,
    chat: bool | None = None,
    seed: int = 0,
    on_batch: OnBatch | None = None,
) -> pd.DataFrame:
    """Measure every vector of a family, and its baselines, on the first prompt of `f` or another.

    Args:
        reference: the family's theta0.
        on_batch: called with the rows done, and the rows in all, after each batch.

    Returns:
        A row for each vector: kind, "unsteered", "reference", "family", "rescaled" (the family at
        the reference's norm) or "random" (of the family's norms); index, the vector's number or -1;
        norm and distance (see `effect_distance`) in units of the residual stream; kl_to_reference,
        KL(P_row || P_reference), kl_from_reference and kl_to_unsteered of the next token, in nats;
        completion, for the first three kinds.

    Raises:
        ValueError: not exactly one reference; another model or layer than that of `f`.

    Source: Jacob G-W 2024, "I found >800 orthogonal 'write code' steering vectors".
    """
    library, start = as_library(vectors), one_vector(reference, "reference")
    compare = _comparison(model, f, library, start, prompt, chat, max_new_tokens, on_batch)
    kinds = {
        "unsteered": torch.zeros_like(start.vectors),
        "reference": start.vectors,
        "family": library.vectors,
        "rescaled": rescale(library, start).vectors,
        "random": random_like(library.vectors, seed),
    }
    table = compare(torch.cat([*kinds.values()]), 2 + len(library))
    table.insert(0, "kind", [kind for kind, rows in kinds.items() for _ in rows])
    table.insert(1, "index", [-1, -1, *3 * library.columns["index"].tolist()])
    return table


def _comparison(
    model: Model,
    f: ActivationMap,
    vectors: SteeringVectors,
    reference: SteeringVectors | None,
    prompt: str | None,
    chat: bool | None,
    max_new_tokens: int,
    on_batch: OnBatch | None,
) -> Callable[[Theta, int], Table]:
    """What measures rows as in `family`, and lets the first write; NaN without a reference."""
    check_place(model, f, vectors, "vectors")
    start = unsteered = torch.zeros_like(as_theta(model, vectors)[:1])
    if reference is not None:
        check_place(model, f, reference, "reference")
        start = as_theta(model, reference)
    text, layer = f.prompts[0] if prompt is None else prompt, f.source_layer
    chat, others = f.chat if chat is None else chat, torch.cat([start, unsteered])
    log_others = next_token_log_probs(model, text, others, layer, chat=chat)
    to, back = kl_to(log_others), kl_to(log_others[:1], "from_reference")

    def measure(log_probs: LogProbs) -> Tensor:
        return torch.cat([to(log_probs), back(log_probs)], 1)[:, [0, 2, 1]]

    def compare(rows: Theta, n_writing: int) -> Table:
        def of_batch(numbers: Tensor) -> pd.DataFrame:
            batch, n_texts = rows[numbers], int((numbers < n_writing).sum())
            added = VectorAdditions.of(batch, layer)
            kl = map_next_token(model, text, added, measure, chat=chat)
            frame = pd.DataFrame({"norm": batch.norm(dim=-1).cpu().numpy(), "distance": math.nan})
            frame[["kl_to_reference", "kl_from_reference", "kl_to_unsteered"]] = kl.numpy()
            if reference is None:
                frame[["kl_to_reference", "kl_from_reference"]] = math.nan
            else:
                frame["distance"] = effect_distance(f, batch, reference).numpy()
            texts: list[Any] = [None] * len(batch)
            if n_texts:
                warn_of_log_probs(model, text, added[:n_texts], kl[:n_texts, 2].isnan())
                options = {"max_new_tokens": max_new_tokens, "chat": chat}
                written = generate(model, text, batch[:n_texts], layer, **options)
                texts[:n_texts] = written["completion"]
            return frame.assign(completion=texts)

        (tell,) = in_parts(on_batch, [len(rows)])
        frames, _ = map_batches(of_batch, torch.arange(len(rows)), _BATCH_SIZE, tell)
        return Table(pd.concat(frames, ignore_index=True))

    return compare


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
    on_batch: OnBatch | None = None,
) -> pd.DataFrame:
    """Add vectors up, the first k of them and random subsets: do they keep the effect?

    Args:
        reference: what to compare with, theta0 of a MELBO-ortho family for example.
        sizes: how many vectors to add up; those beyond the library are left out.
        n_random_subsets: different ones of each size, at most 1,000; fewer where there are no more.

    Returns:
        A row for each composition: size; members, positions in `vectors`; subset, "first" or
        "random"; combination, "mean" or "sum"; scaling, "raw", "reference norm" or "mean norm" (of
        the members), of the mean alone, since the sum would be the same vector; norm,
        kl_to_reference, kl_to_unsteered, distance, completion as in `family`. What needs a
        reference is NaN, or missing, without one. A sum of zero stays zero.

    Raises:
        ValueError: as `family` does; a number out of its range; no size that fits.
    """
    library = as_library(vectors)
    start = None if reference is None else one_vector(reference, "reference")
    checks.between(0, MOST_SUBSETS, "how many", n_random_subsets=n_random_subsets)
    compare = _comparison(model, f, library, start, prompt, chat, max_new_tokens, on_batch)
    fitting = [size for size in dict.fromkeys(sizes) if size <= len(library)]
    checks.at_least(1, sizes=min(sizes, default=1))
    if not fitting:
        count = len(library)
        raise ValueError(f"sizes: none fits a library of {count} vectors; allowed are 1 to {count}")
    norm = None if start is None else start.vectors.norm()
    kinds, rows = [], []
    for members in _subsets(len(library), fitting, n_random_subsets, seed):
        subset = "first" if members == tuple(range(len(members))) else "random"
        for combination, scaling, theta in _combinations(library.vectors[list(members)], norm):
            kinds.append((len(members), members, subset, combination, scaling))
            rows.append(theta)
    measured = compare(torch.stack(rows), len(rows))
    return Table(pd.concat([pd.DataFrame(kinds, columns=_KIND), measured[_MEASURED]], axis=1))


def _subsets(
    n_vectors: int, sizes: Sequence[int], n_random: int, seed: int
) -> Iterator[tuple[int, ...]]:
    """Of each size the first vectors, and then different random ones."""
    generator = torch.Generator().manual_seed(seed)
    for size in sizes:
        seen = {tuple(range(size)): None}
        while len(seen) < min(1 + n_random, math.comb(n_vectors, size)):
            drawn = torch.randperm(n_vectors, generator=generator)[:size]
            seen.setdefault(tuple(drawn.sort().values.tolist()))
        yield from seen


def _combinations(members: Theta, norm: Tensor | None) -> Iterator[tuple[str, str, Tensor]]:
    """Mean and sum, and the mean at each norm, where the sum would be the same vector."""
    mean = members.mean(0)
    yield "mean", "raw", mean
    if norm is not None:
        yield "mean", "reference norm", _at_norm(mean, norm)
    # A single vector is its mean, its sum, and at its own norm.
    if len(members) > 1:
        yield "mean", "mean norm", _at_norm(mean, members.norm(dim=-1).mean())
        yield "sum", "raw", members.sum(0)


def _at_norm(theta: Tensor, norm: Tensor) -> Tensor:
    return theta * (norm / theta.norm()) if theta.any() else theta


@dataclass(frozen=True)
class Family:
    """A MELBO-ortho family, its theta0 (`reference`), and what `collect_family` measured."""

    reference: SteeringVectors
    vectors: SteeringVectors
    table: pd.DataFrame
    composition: pd.DataFrame

    @property
    def number(self) -> int:
        """The reference's number in its library."""
        return int(self.reference.columns["index"][0])


@shape_checked
def collect_family(
    model: Model,
    f: ActivationMap,
    vectors: SteeringVectors,
    reference: SteeringVectors,
    *,
    sizes: Sequence[int] = (2, 3, 10, 20),
    max_new_tokens: int = 50,
    on_batch: OnBatch | None = None,
) -> Family:
    """Measure a family for the report: `analysis.family`, and `analysis.composition` of `sizes`."""
    sizes = [size for size in sizes if size <= len(vectors)] or [1]
    # Of each size, up to four subsets, each in four ways.
    first, then = in_parts(on_batch, [2 + 3 * len(vectors), 16 * len(sizes)])
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens}
    table = family(model, f, vectors, reference, **options, on_batch=first)
    composed = composition(model, f, vectors, reference, sizes, **options, on_batch=then)
    return Family(one_vector(reference, "reference"), vectors, table, composed)
