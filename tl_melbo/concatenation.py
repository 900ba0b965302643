"""Several libraries as one."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tl_melbo.shapes import shape_checked
from tl_melbo.stored import Kept, Library
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
        ValueError: none given, or they differ in model, source layer or a width.
    """
    if not libraries:
        raise ValueError("libraries: none given; pass at least one")
    stories = [library.story for library in libraries]
    place = {}
    for fact in _PLACE:
        # Known in one part only: it still holds for the whole.
        known = {story.get(fact) for story in stories} - {None}
        place[fact] = _only(known, fact, "only vectors for the same place can be one library")
    _only({library.vectors.shape[1] for library in libraries}, "d_model", "take those of one model")
    shared = {
        fact: value
        for fact, value in stories[0].items()
        if all(story.get(fact) == value for story in stories)
    }
    parts = [{**library.story, "n_vectors": len(library)} for library in libraries]
    story = {**shared, **place, "method": "concatenate", "parts": parts, "date": now()}
    return one_after_another(libraries, story, left_out=("index",))


def _only(values: set[Any], fact: str, advice: str) -> Any:
    """The one value that there is, or None."""
    if len(values) > 1:
        raise ValueError(f"libraries differ in {fact}: {sorted(map(str, values))}; {advice}")
    return next(iter(values), None)


def one_after_another(
    libraries: Sequence[Kept], story: Mapping[str, Any], left_out: Sequence[str] = ()
) -> Kept:
    """The tensors, columns and histories of several libraries of one kind, with one story."""
    names = dict.fromkeys(name for library in libraries for name in library.columns)
    words = story.get("categories", {})
    steps = max(0 if each.history is None else each.history.shape[1] for each in libraries)
    own = libraries[0].kind.axes
    return type(libraries[0])(
        **{axis: torch.cat([getattr(each, axis) for each in libraries]) for axis in own},
        story=story,
        columns={n: _column(libraries, n, n in words) for n in names if n not in left_out},
        history=torch.cat([_history(each, steps) for each in libraries]) if steps else None,
    )


def _column(libraries: Sequence[Library], name: str, is_words: bool) -> Tensor:
    """One column of all libraries, with NaN, or the code of no word, where one lacks it."""
    known = [library.columns[name] for library in libraries if name in library.columns]
    shapes = {tuple(each.shape[1:]) for each in known}
    shape = _only(shapes, f"the width of column {name!r}", "join those of one width")
    filler, dtype = (-1, known[0].dtype) if is_words else (torch.nan, torch.float32)
    return torch.cat(
        [
            library.columns.get(name, torch.full((len(library), *shape), filler, dtype=dtype))
            for library in libraries
        ]
    )


def _history(library: Library, steps: int) -> Tensor:
    """A history of so many steps, with NaN after its last."""
    known = library.history
    known = torch.empty(len(library), 0, dtype=torch.float32) if known is None else known
    return torch.nn.functional.pad(known, (0, steps - known.shape[1]), value=torch.nan)
