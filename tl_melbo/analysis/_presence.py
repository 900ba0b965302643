"""Natural activations: does the unsteered residual stream project onto the vectors?"""

from collections.abc import Sequence

import pandas as pd
import torch
from torch import Tensor

from tl_melbo import checks
from tl_melbo.analysis._texts import PASSAGES
from tl_melbo.geometry import normalise
from tl_melbo.model.bridge import Model, residual_streams
from tl_melbo.model.tokens import to_tokens
from tl_melbo.shapes import Float, checked_slice, shape_checked
from tl_melbo.steering import Vectors, as_library, as_theta, one_vector, steering_layer
from tl_melbo.tables import Table
from tl_melbo.text import quoted

Texts = str | Sequence[str]
MOST_FRAMES = 100_000
# How many float64 numbers of the null's projections are held at once: 128 MiB.
_MOST_NUMBERS = 2**24


@shape_checked
def presence(
    model: Model,
    vectors: Vectors,
    texts: Texts,
    control_texts: Texts,
    *,
    layer: int | None = None,
    n_frames: int = 200,
    seed: int = 0,
    positions: slice = slice(1, None),
    other_texts: tuple[Texts, Texts] | None = None,
) -> pd.DataFrame:
    """Does the unsteered model use these directions where a behaviour shows? `presence_statistics`.

    Args:
        texts: raw texts that show the behaviour, code for example.
        control_texts: raw texts that do not.
        other_texts: others of both kinds, from which the positive control is made: the difference
            of the means of their residuals. It tells whether the test could have found anything.
        positions: which tokens of each text count. By default all but the first, which is an
            attention sink in most models.

    Source of the question, not of the test: Jacob G-W 2024, "I found >800 orthogonal ...".
    """
    library = as_library(vectors)
    as_theta(model, library)
    layer = steering_layer(model, library, layer)
    residuals = residuals_of(model, texts, layer, positions)
    control = residuals_of(model, control_texts, layer, positions, "control_texts")
    known = None
    if other_texts is not None:
        used = {*checks.as_texts(texts), *checks.as_texts(control_texts)}
        means = []
        for place, some in enumerate(other_texts):
            name = f"other_texts[{place}]"
            for text in used.intersection(checks.as_texts(some, name)):
                what = f"{name}: holds {quoted(text)}, which the test is made on"
                raise ValueError(f"{what}; pass others")
            means.append(residuals_of(model, some, layer, positions, name).mean(0))
        known = means[0] - means[1]
    return presence_statistics(
        residuals, control, library, n_frames=n_frames, seed=seed, known_direction=known
    )


@shape_checked
def presence_statistics(
    residuals: Float[Tensor, "token _"],
    control: Float[Tensor, "control_token _"],
    vectors: Vectors,
    *,
    n_frames: int = 200,
    seed: int = 0,
    known_direction: Float[Tensor, "d_model"] | None = None,
) -> pd.DataFrame:
    """Compare projections on each vector in two sets of residuals, against random directions.

    The statistic is |AUROC - 1/2|; its null are random orthonormal frames of as many vectors.

    Args:
        residuals: the residual stream where the behaviour shows, a row a token.
        control: the same where it does not.
        n_frames: of the null, from 1 to 100,000.
        known_direction: one that is known to tell the two apart, made from other residuals.

    Returns:
        A row for each vector: index; mean_projection and mean_projection_control on the unit
        vector, in units of the residual stream; auroc, the chance that a token of `residuals`
        projects further than one of `control`; p_value; p_adjusted (Benjamini and Hochberg). With
        `known_direction` also kind, "vector" or "control": the last row is its own, of index -1,
        and not adjusted for the vectors.

    Raises:
        ValueError: no vectors or tokens, values that are not finite, widths that differ, or too few
            or many frames.
    """
    library = as_library(vectors)
    rows, n_vectors = library.vectors.double(), len(library)
    if known_direction is not None:
        checks.width(known_direction, rows.shape[1], "known_direction", "each vector")
        known = checks.directions(known_direction.detach().cpu().double()[None], "known_direction")
        rows = torch.cat([rows.cpu(), known])
    units = normalise(rows)
    checks.between(1, MOST_FRAMES, "200 will do", n_frames=n_frames)
    here, there = (rows.detach().cpu().double() for rows in (residuals, control))
    for rows, argument in ((here, "residuals"), (there, "control")):
        if not len(rows):
            raise ValueError(f"{argument}: no tokens; pass the residual stream of at least one")
        checks.width(rows, units.shape[1], argument, "each vector")
        checks.finite(rows, argument, "tokens", "load the model with dtype=torch.float32")
    projections, control_projections = here @ units.T, there @ units.T
    excess = _excess(projections.T, control_projections.T)
    null = _null_excess(here, there, n_vectors, n_frames, seed).abs().sort().values
    n_reaching = len(null) - torch.searchsorted(null, excess.abs())
    p_values = (1 + n_reaching).double() / (1 + len(null))
    adjusted = torch.cat([benjamini_hochberg(p_values[:n_vectors]), p_values[n_vectors:]])
    index = [*library.columns["index"].tolist(), -1][: len(units)]
    table = Table(
        {
            "index": index,
            "mean_projection": projections.mean(0).numpy(),
            "mean_projection_control": control_projections.mean(0).numpy(),
            "auroc": (0.5 + excess.double() / (2 * len(here) * len(there))).numpy(),
            "p_value": p_values.numpy(),
            "p_adjusted": adjusted.numpy(),
        }
    )
    if known_direction is not None:
        table.insert(0, "kind", ["vector"] * n_vectors + ["control"])
    return table


def benjamini_hochberg(p_values: Float[Tensor, "test"]) -> Float[Tensor, "test"]:
    """P-values under q, so adjusted, hold a share of false discoveries of at most q.

    Source: Benjamini & Hochberg 1995, "Controlling the false discovery rate".
    """
    ordered, order = p_values.sort(descending=True)
    n_tests = len(p_values)
    ranks = torch.arange(n_tests, 0, -1, dtype=p_values.dtype)
    adjusted = (ordered * n_tests / ranks).cummin(0).values.clamp_max(1.0)
    return torch.empty_like(adjusted).scatter(0, order, adjusted)


def residuals_of(
    model: Model,
    texts: str | Sequence[str],
    layer: int,
    positions: slice = slice(1, None),
    argument: str = "texts",
) -> Float[Tensor, "token d_model"]:
    """The unsteered residual stream after a block, at the chosen tokens of all texts in a row."""
    listed = checks.as_texts(texts, argument)
    tokens = [to_tokens(model, text) for text in listed]
    kept = [residual_streams(model, each, [layer])[0][0].float().cpu() for each in tokens]
    parts = [residual[list(range(len(residual))[checked_slice(positions)])] for residual in kept]
    for number, (text, residual, chosen) in enumerate(zip(listed, kept, parts, strict=True)):
        if not len(chosen):
            given = f"{argument}[{number}]={text[:40]!r}: {len(residual)} token(s)"
            raise ValueError(f"{given}, of which positions={positions} leaves none; leave it out")
    return torch.cat(parts)


@shape_checked
def token_projections(
    model: Model, vector: Vectors, text: str, layer: int | None = None
) -> tuple[list[str], list[float]]:
    """A text's tokens, and how far the unsteered residual at each points along a vector.

    In standard deviations from the mean over the tokens of PASSAGES; 0 for the first token.
    """
    theta = one_vector(vector, "vector")
    layer = steering_layer(model, theta, layer)
    unit = normalise(as_theta(model, theta))[0].cpu()
    own = residuals_of(model, text, layer, argument="text") @ unit
    prose = residuals_of(model, PASSAGES, layer) @ unit
    if not prose.std() > 0:
        raise ValueError("vector: no token of ordinary prose projects on it; pass another")
    tokens = [model.tokenizer.decode([token]) for token in to_tokens(model, text)[0].tolist()]
    return tokens, [0.0, *((own - prose.mean()) / prose.std()).tolist()]


def _excess(
    projections: Float[Tensor, "vector token"], control: Float[Tensor, "vector control_token"]
) -> Tensor:
    """(2 AUROC - 1) times the number of pairs: whole, so that equal statistics are equal."""
    control, projections = control.contiguous().sort(dim=-1).values, projections.contiguous()
    below = torch.searchsorted(control, projections)
    not_above = torch.searchsorted(control, projections, right=True)
    return (below + not_above - control.shape[1]).sum(-1)


def _null_excess(
    residuals: Tensor, control: Tensor, n_vectors: int, n_frames: int, seed: int
) -> Tensor:
    """The statistic for every vector of every random orthonormal frame."""
    generator = torch.Generator().manual_seed(seed)
    d_model = residuals.shape[1]
    # More vectors than dimensions are several frames.
    sizes = [len(chunk) for chunk in torch.arange(n_vectors).split(d_model)]
    at_once = max(1, _MOST_NUMBERS // (n_vectors * max(len(residuals) + len(control), d_model)))
    parts = []
    for some in torch.arange(n_frames).split(at_once):
        for size in sizes:
            shape = (len(some), d_model, size)
            normal = torch.randn(shape, generator=generator, dtype=torch.float64)
            frames = torch.linalg.qr(normal).Q.transpose(1, 2).flatten(0, 1)
            parts.append(_excess(frames @ residuals.T, frames @ control.T))
    return torch.cat(parts)
