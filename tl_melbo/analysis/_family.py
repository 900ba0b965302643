"""What became of a MELBO-ortho family: every vector beside its baselines, in one table."""

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
import torch

from tl_melbo.activation_map import ActivationMap
from tl_melbo.analysis._completions import OnBatch
from tl_melbo.analysis._composition import composition
from tl_melbo.analysis._divergence import comparison, random_like
from tl_melbo.analysis._scaling import rescale
from tl_melbo.model.bridge import Model
from tl_melbo.shapes import shape_checked
from tl_melbo.steering import Reference, Vectors, as_library, one_vector
from tl_melbo.tables import Table
from tl_melbo.vectors import SteeringVectors

_BATCH_SIZE = 32
# Those that also write.
_WRITING = ("unsteered", "reference", "family")


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
        reference: exactly one vector: the family's theta0.
        prompt: where KL and completion are taken; None for the first prompt of `f`.
        on_batch: called with the rows done, and the rows in all, after each batch.

    Returns:
        One row a vector. kind: "unsteered" (no vector), "reference", "family", "rescaled" (the
        family at the reference's norm) or "random" (random directions with the family's norms);
        index, the vector's number, -1 for the first two kinds; norm, and distance
        |z - z_reference| as in `effect_distance`, in units of the residual stream;
        kl_to_reference, KL(P_row || P_reference), kl_from_reference, the reverse, and
        kl_to_unsteered, KL(P_row || P_unsteered), of the next token, in nats; completion, for the
        first three kinds.

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


@dataclass(frozen=True)
class Family:
    """A MELBO-ortho family and what `collect_family` measured of it, for the page.

    Attributes:
        reference: theta0, the one vector that it grew from.
        vectors: as `melbo_ortho` gives them.
        table: as `analysis.family` gives it.
        composition: as `analysis.composition` gives it.
    """

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
        reference: exactly one vector, the family's theta0.
        sizes: how many vectors to add up; those beyond the family are left out.
        on_batch: called with the rows done, and the rows in all, after each batch.

    Raises:
        ValueError: as `analysis.family` and `analysis.composition` do.
    """
    table = family(model, f, vectors, reference, max_new_tokens=max_new_tokens, on_batch=on_batch)
    sizes = [size for size in sizes if size <= len(vectors)] or [1]
    composed = composition(model, f, vectors, reference, sizes, max_new_tokens=max_new_tokens)
    return Family(one_vector(reference, "reference"), vectors, table, composed)
