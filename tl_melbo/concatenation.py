"""Several libraries as one."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tl_melbo.shapes import Float, shape_checked
from tl_melbo.story import now
from tl_melbo.vectors import SteeringVectors

# What all parts must agree on, where they know it.
_PLACE = ("model", "source_layer")


@shape_checked
def concatenate(libraries: Sequence[SteeringVectors]) -> SteeringVectors:
    """Join libraries for the same model and source layer into one, renumbered from 0.

    Numbers that only some of them have are NaN for the others, and words are missing. The stories
    are kept as `parts`.

    Raises:
        TypeError: something is not a SteeringVectors.
        ValueError: none given, or they differ in model, width or source layer, or in the width of
            a column.
    """
    if not libraries:
        raise ValueError("libraries: none given; pass at least one")
    for fact in _PLACE:
        values = {library.story.get(fact) for library in libraries} - {None}
        if len(values) > 1:
            raise ValueError(
                f"libraries differ in {fact}: {sorted(map(str, values))}; only vectors for the "
                "same place in the same model can be one library"
            )
    widths = {library.vectors.shape[1] for library in libraries}
    if len(widths) > 1:
        raise ValueError(f"libraries differ in d_model: {sorted(widths)}")
    shared = {
        fact: value
        for fact, value in libraries[0].story.items()
        if all(library.story.get(fact) == value for library in libraries)
    }
    # Known in one part only: it still holds for the whole (checked above).
    for fact in _PLACE:
        known = [lib.story[fact] for lib in libraries if lib.story.get(fact) is not None]
        shared[fact] = known[0] if known else None
    parts = [{**library.story, "n_vectors": len(library)} for library in libraries]
    story = {**shared, "method": "concatenate", "parts": parts, "date": now()}
    return one_after_another(libraries, story, left_out=("index",))


def one_after_another(
    libraries: Sequence[SteeringVectors], story: Mapping[str, Any], left_out: Sequence[str] = ()
) -> SteeringVectors:
    """The vectors, columns and histories of several libraries, with one story."""
    names = dict.fromkeys(name for library in libraries for name in library.columns)
    words = story.get("categories", {})
    columns = {n: _column(libraries, n, n in words) for n in names if n not in left_out}
    return SteeringVectors(
        torch.cat([library.vectors for library in libraries]),
        story,
        columns,
        pad_histories([library.history for library in libraries], [*map(len, libraries)]),
    )


def _column(libraries: Sequence[SteeringVectors], name: str, is_words: bool) -> Tensor:
    """One column of all libraries, with NaN, or the code of no word, where one lacks it."""
    known = [library.columns[name] for library in libraries if name in library.columns]
    shapes = {tuple(column.shape[1:]) for column in known}
    if len(shapes) > 1:
        raise ValueError(
            f"libraries differ in the shape of column {name!r}: {sorted(shapes)}; only columns of "
            "one width can be joined"
        )
    shape, filler = shapes.pop(), -1 if is_words else torch.nan
    dtype = known[0].dtype if is_words else torch.float32
    return torch.cat(
        [
            library.columns.get(name, torch.full((len(library), *shape), filler, dtype=dtype))
            for library in libraries
        ]
    )


def pad_histories(
    histories: Sequence[Tensor | None], lengths: Sequence[int] | None = None
) -> Float[Tensor, "vector step"] | None:
    """Stack histories of different lengths, with NaN after each one's last step.

    Args:
        histories: each [vector, step]; None where there is none.
        lengths: the number of vectors of each, needed where some are None.
    """
    steps = max((history.shape[1] for history in histories if history is not None), default=0)
    if not steps:
        return None
    counts = lengths or [len(history) for history in histories if history is not None]
    padded = []
    for history, count in zip(histories, counts, strict=True):
        known = torch.empty(count, 0, dtype=torch.float32) if history is None else history
        padded.append(torch.nn.functional.pad(known, (0, steps - known.shape[1]), value=torch.nan))
    return torch.cat(padded)
