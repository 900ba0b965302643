"""Vectors of one effect: a MELBO-ortho family beside its baselines, and what its sums do."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from torch import Tensor

from tl_melbo import checks
from tl_melbo.activation_map import ActivationMap
from tl_melbo.analysis._completions import OnBatch
from tl_melbo.analysis._scaling import rescale
from tl_melbo.analysis._similarity import effect_distance, kl_to, random_like
from tl_melbo.generation import generate
from tl_melbo.model.bridge import Model
from tl_melbo.probability import LogProbs
from tl_melbo.reading import map_next_token, next_token_log_probs, warn_of_log_probs
from tl_melbo.shapes import Theta, shape_checked
from tl_melbo.steering import Reference, Vectors, as_library, as_theta, check_place, one_vector
from tl_melbo.tables import Table
from tl_melbo.vectors import SteeringVectors

_BATCH_SIZE = 32
# Those that also write.
_WRITING = ("unsteered", "reference", "family")
# Each is written with, several times; nobody reads more.
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
    """Measure every vector of a family, and its baselines.

    Args:
        reference: the family's theta0.
        prompt: where KL and completion are taken; None for the first prompt of `f`.
        on_batch: called with the rows done, and the rows in all, after each batch.

    Returns:
        One row a vector. kind: "unsteered", "reference", "family", "rescaled" (the family at the
        reference's norm) or "random" (random directions with the family's norms); index, the
        vector's number, -1 for the first two kinds; norm, and distance |z - z_reference| as in
        `effect_distance`, in units of the residual stream; kl_to_reference, KL(P_row ||
        P_reference), kl_from_reference, the reverse, and kl_to_unsteered, KL(P_row || P_unsteered),
        of the next token, in nats; completion, for the first three kinds.

    Raises:
        ValueError: no vectors; not exactly one reference; another model or layer than that of `f`;
            as `generate` does.

    Source: Jacob G-W 2024, "I found >800 orthogonal 'write code' steering vectors".
    """
    library, start = as_library(vectors), one_vector(reference, "reference")
    compare = comparison(model, f, library, start, prompt, chat, max_new_tokens)
    kinds = {
        "unsteered": torch.zeros_like(start.vectors),
        "reference": start.vectors,
        "family": library.vectors,
        "rescaled": rescale(library, start).vectors,
        "random": random_like(library.vectors, seed),
    }
    n_rows, n_done = sum(map(len, kinds.values())), 0
    frames = []
    for kind, rows in kinds.items():
        for batch in rows.split(_BATCH_SIZE):
            frame = compare(batch, kind in _WRITING)
            frame.insert(0, "kind", kind)
            frames.append(frame)
            n_done += len(batch)
            if on_batch is not None:
                on_batch(n_done, n_rows)
    table = Table(pd.concat(frames, ignore_index=True))
    table.insert(1, "index", [-1, -1, *3 * library.columns["index"].tolist()])
    return table


def comparison(
    model: Model,
    f: ActivationMap,
    vectors: SteeringVectors,
    reference: SteeringVectors | None,
    prompt: str | None,
    chat: bool | None,
    max_new_tokens: int,
) -> Callable[[Theta, bool], pd.DataFrame]:
    """Check where vectors belong; then give what compares any rows with the reference.

    It measures norm, distance and three divergences as in `family`, and completion, if the rows are
    to write. What needs a reference is NaN without one.

    Raises:
        ValueError: the vectors or the reference are of another model, width or layer than `f`.
    """
    check_place(model, f, vectors, "vectors")
    unsteered = torch.zeros_like(as_theta(model, vectors)[:1])
    start = unsteered
    if reference is not None:
        check_place(model, f, reference, "reference")
        start = as_theta(model, reference)
    text = f.prompts[0] if prompt is None else prompt
    layer, chat = f.source_layer, f.chat if chat is None else chat
    others = torch.cat([start, unsteered])
    log_others = next_token_log_probs(model, text, others, layer, chat=chat)
    to, back = kl_to(log_others), kl_to(log_others[:1], "from_reference")

    def measure(log_probs: LogProbs) -> Tensor:
        return torch.cat([to(log_probs), back(log_probs)], 1)

    def compare(rows: Theta, writes: bool) -> pd.DataFrame:
        kl = map_next_token(model, text, rows, layer, measure, chat=chat)
        to_reference, to_unsteered, from_reference = kl.unbind(1)
        distance = to_reference if reference is None else effect_distance(f, rows, reference)
        columns = {
            "norm": rows.norm(dim=-1),
            "distance": distance,
            "kl_to_reference": to_reference,
            "kl_from_reference": from_reference,
            "kl_to_unsteered": to_unsteered,
        }
        frame = pd.DataFrame({name: column.cpu().numpy() for name, column in columns.items()})
        if reference is None:
            frame[["distance", "kl_to_reference", "kl_from_reference"]] = torch.nan
        frame["completion"] = None
        if writes:
            warn_of_log_probs(model, text, layer, to_unsteered.isnan())
            options = {"max_new_tokens": max_new_tokens, "chat": chat}
            frame["completion"] = generate(model, text, rows, layer, **options)["completion"]
        return frame

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
) -> pd.DataFrame:
    """Add vectors up, the first k of them and random subsets, and see whether they still work.

    Each subset gives its mean and its sum: raw, rescaled to the reference's norm, and rescaled to
    the mean norm of its members.

    Args:
        reference: what to compare with, theta0 of a MELBO-ortho family for example.
        sizes: how many vectors to add up; sizes beyond the library are left out.
        n_random_subsets: of each size, all different, at most 1,000; fewer where there are no more.
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
    fitting = [size for size in dict.fromkeys(sizes) if size <= len(library)]
    checks.at_least(1, sizes=min(sizes, default=1))
    if not fitting:
        raise ValueError(
            f"sizes={tuple(sizes)}: none fits a library of {len(library)} vectors; allowed are 1 "
            f"to {len(library)}"
        )
    norm = None if start is None else start.vectors.norm()
    kinds, rows = [], []
    for members, subset in _subsets(len(library), fitting, n_random_subsets, seed):
        for combination, scaling, theta in _combinations(library.vectors[list(members)], norm):
            kinds.append((len(members), members, subset, combination, scaling))
            rows.append(theta)
    # Many rows are one and the same vector; each is run once.
    distinct, which = torch.stack(rows).unique(dim=0, return_inverse=True)
    measured = compare(distinct, True).iloc[which.tolist()].reset_index(drop=True)
    return Table(pd.concat([pd.DataFrame(kinds, columns=_KIND), measured[_MEASURED]], axis=1))


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
    """Measure a family for the page: `analysis.family` and `analysis.composition`.

    Args:
        sizes: how many vectors to add up; those beyond the family are left out.
        on_batch: called with the rows done, and the rows in all, after each batch.

    Raises:
        ValueError: as `analysis.family` and `analysis.composition` do.
    """
    table = family(model, f, vectors, reference, max_new_tokens=max_new_tokens, on_batch=on_batch)
    sizes = [size for size in sizes if size <= len(vectors)] or [1]
    composed = composition(model, f, vectors, reference, sizes, max_new_tokens=max_new_tokens)
    return Family(one_vector(reference, "reference"), vectors, table, composed)
