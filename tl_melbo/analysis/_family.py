"""What became of a MELBO-ortho family: every vector beside its baselines, in one table."""

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from torch import Tensor

from tl_melbo.activation_map import ActivationMap
from tl_melbo.analysis._completions import OnBatch
from tl_melbo.analysis._composition import composition
from tl_melbo.analysis._distance import effect_distance
from tl_melbo.analysis._divergence import random_like
from tl_melbo.analysis._scaling import rescale
from tl_melbo.generation import generate
from tl_melbo.model.bridge import Model
from tl_melbo.probability import LogProbs, kl_from_log_probs
from tl_melbo.reading import map_next_token, next_token_log_probs
from tl_melbo.shapes import shape_checked
from tl_melbo.steering import Reference, Vectors, as_library, as_theta, check_place, one_vector
from tl_melbo.tables import Table
from tl_melbo.vectors import SteeringVectors

# A vocabulary is large: only so many vectors' distributions are held at a time.
_BATCH_SIZE = 32
# Those that also write.
_WRITING = ("unsteered", "reference", "family")
_MEASURES = ("kl_to_reference", "kl_from_reference", "kl_to_unsteered")


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
) -> "pd.DataFrame":
    """Measure every vector of a family, and what it is to be held against.

    Args:
        model: the TransformerLens model that `f` was made from.
        f: the activation map that the family was found in.
        vectors: the family, as `melbo_ortho` gives it.
        reference: exactly one vector: the family's theta0.
        prompt: where KL and completion are taken; None for the first prompt of `f`.
        max_new_tokens: the most tokens to write.
        chat: format the prompt as chat; None does as `f` does.
        seed: for the random vectors.
        on_batch: called with the rows done, and the rows in all, after each batch.

    Returns:
        One row a vector. kind: "unsteered" (no vector), "reference", "family", "rescaled" (the
        family at the reference's norm) or "random" (random directions with the family's norms);
        index, the vector's number, -1 for the first two kinds; norm, and distance
        |z - z_reference| as in `effect_distance`, in units of the residual stream;
        kl_to_reference, KL(P_row || P_reference), kl_from_reference, the reverse, and
        kl_to_unsteered, KL(P_row || P_unsteered), of the next token, in nats; completion, for the
        first three kinds, else missing.

    Raises:
        ValueError: no vectors; more or fewer than one reference; another model or layer than that
            of `f`; as `generate` does.

    Source: Jacob G-W 2024, "I found >800 orthogonal 'write code' steering vectors".
    """
    library, start = as_library(vectors), one_vector(reference, "reference")
    for checked, argument in ((library, "vectors"), (start, "reference")):
        check_place(model, f, checked, argument)
    theta, start_theta = as_theta(model, library), as_theta(model, start)
    kinds = {
        "unsteered": torch.zeros_like(start_theta),
        "reference": start_theta,
        "family": theta,
        "rescaled": rescale(library, start).vectors,
        "random": random_like(theta, seed),
    }
    prompt = f.prompts[0] if prompt is None else prompt
    chat = f.chat if chat is None else chat
    numbers = library.columns["index"].tolist()
    one = torch.cat([kinds["unsteered"], start_theta])
    log_one = next_token_log_probs(model, prompt, one, f.source_layer, chat=chat)

    def measure(log_probs: LogProbs) -> Tensor:
        log_unsteered, log_reference = (row.expand_as(log_probs) for row in log_one.split(1))
        pairs = ((log_probs, log_reference), (log_reference, log_probs), (log_probs, log_unsteered))
        return torch.stack([kl_from_log_probs(*pair) for pair in pairs], 1)

    n_rows, n_done = sum(map(len, kinds.values())), 0
    frames = []
    for kind, rows in kinds.items():
        for batch in rows.split(_BATCH_SIZE):
            kl = map_next_token(model, prompt, batch, f.source_layer, measure, chat=chat)
            frame = pd.DataFrame(kl.numpy(), columns=[*_MEASURES])
            frame.insert(0, "kind", kind)
            frame.insert(1, "norm", batch.norm(dim=-1).cpu().numpy())
            frame.insert(2, "distance", effect_distance(f, batch, start_theta).numpy())
            frame["completion"] = None
            if kind in _WRITING:
                frame["completion"] = generate(
                    model, prompt, batch, f.source_layer, max_new_tokens=max_new_tokens, chat=chat
                )["completion"]
            frames.append(frame)
            n_done += len(batch)
            if on_batch is not None:
                on_batch(n_done, n_rows)
    table = Table(pd.concat(frames, ignore_index=True))
    table.insert(1, "index", [-1, -1, *3 * numbers])
    return table


@dataclass(frozen=True)
class Family:
    """A MELBO-ortho family and what was measured of it, for the page: see `collect_family`.

    Attributes:
        reference: the one vector that it grew from, theta0.
        vectors: the family, as `melbo_ortho` gives it.
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
        model: the TransformerLens model that `f` was made from.
        f: the activation map that the family was found in.
        vectors: the family, as `melbo_ortho` gives it.
        reference: exactly one vector, its theta0.
        sizes: how many vectors to add up; those beyond the family are left out.
        max_new_tokens: the most tokens of each completion.
        on_batch: called with the rows done, and the rows in all, after each batch.

    Raises:
        ValueError: as `analysis.family` and `analysis.composition` do.
    """
    table = family(model, f, vectors, reference, max_new_tokens=max_new_tokens, on_batch=on_batch)
    sizes = [size for size in sizes if size <= len(vectors)] or [1]
    composed = composition(model, f, vectors, reference, sizes, max_new_tokens=max_new_tokens)
    return Family(one_vector(reference, "reference"), vectors, table, composed)
