"""An atlas of pairs of layers: its libraries, its table, its files."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tl_melbo import vectors_file
from tl_melbo.errors import DifferentSearch
from tl_melbo.shapes import shape_checked
from tl_melbo.story import differences
from tl_melbo.tables import Table
from tl_melbo.vectors import SteeringVectors

# Columns of a library that the table has, too.
_NUMBERS = ("target_layer", "vector", "singular_value", "share", "cumulative_share")
_SIGNS = (1, -1)
# What `file_name` gives for all sources.
FILES = "source-*.safetensors"


@dataclass(frozen=True, eq=False, repr=False)
class Atlas:
    """The top singular vectors of pairs of layers, and what they do.

    Attributes:
        libraries: by source layer, the vectors of its pairs, nearest target first. Columns: those
            of `table`, and kl as [vector, prompt, sign]. The metadata hold the completions.
    """

    libraries: Mapping[int, SteeringVectors]

    def __repr__(self) -> str:
        targets = [{*each.columns["target_layer"].tolist()} for each in self.libraries.values()]
        return f"Atlas({sum(map(len, targets))} pairs of layers, {len(targets)} sources)"

    def _repr_html_(self) -> str:
        return self.table._repr_html_()

    @property
    def table(self) -> Table:
        """A row for each pair, vector, sign and prompt: see `atlas`."""
        return Table([row for each in self.libraries.values() for row in _rows(each)])

    def vectors(self, source_layer: int, target_layer: int) -> SteeringVectors:
        """The vectors of one pair, the largest singular value first; ValueError for no such pair.

        with tm.steered(model, -atlas.vectors(8, 16)[0]): ...
        """
        library = self.libraries.get(source_layer)
        if library is None or target_layer not in library.columns["target_layer"]:
            pair = f"source_layer={source_layer}, target_layer={target_layer}"
            raise ValueError(f"{pair}: not a pair of this atlas; its table names those that are")
        return library[library.columns["target_layer"] == target_layer]

    @classmethod
    @shape_checked
    def load(cls, folder: str | Path) -> "Atlas":
        """Read the sources that `atlas(..., folder=folder)` has kept.

        Raises:
            FileNotFoundError: there are none.
            Damaged: a file is cut or damaged, or not one of an atlas.
            DifferentSearch: the files are of several atlases.
        """
        libraries = load(Path(folder).expanduser())
        if not libraries:
            raise FileNotFoundError(f"{folder}: holds no atlas; name a folder that atlas() filled")
        return cls(libraries)


def file_name(source: int) -> str:
    """The file of one source."""
    return f"source-{source:02d}.safetensors"


def load(folder: Path, facts: Mapping[str, Any] | None = None) -> dict[int, SteeringVectors]:
    """The libraries in a folder, by source: of one atlas, and of that of these facts, if any."""
    libraries: dict[Any, SteeringVectors] = {}
    for path in sorted(folder.glob(FILES)):
        library = SteeringVectors.load(path)
        with vectors_file.damage_told(path):
            _check(library)
        theirs = {**library.story, "source_layer": None}
        if differing := differences(theirs, facts or theirs):
            advice = "ask for the same to continue it, or choose another folder"
            raise DifferentSearch.of(str(path), differing, advice)
        facts = facts or theirs
        libraries[library.source_layer] = library
    return dict(sorted(libraries.items()))


def _check(library: SteeringVectors) -> None:
    """Make sure that a file holds what the table of an atlas reads."""
    story, columns = library.story, library.columns
    shape = (len(library), len(story.get("prompts") or ()), len(_SIGNS))
    there = all(columns.get(name, library.vectors).ndim == 1 for name in _NUMBERS)
    if library.source_layer is None or not there or "kl" not in columns:
        raise ValueError("not the vectors of an atlas")
    texts, plain = (np.array(story.get(n), dtype=object) for n in ("completions", "unsteered"))
    same = columns["kl"].shape == texts.shape == shape and plain.shape == shape[1:2]
    if not same or not all(isinstance(each, str | None) for each in (*texts.flat, *plain.flat)):
        raise ValueError("its numbers and completions are not of the same vectors and prompts")


def _rows(library: SteeringVectors) -> Iterator[dict[str, Any]]:
    """The rows of one source."""
    story, norms = library.story, library.norms.tolist()
    numbers = {name: library.columns[name].tolist() for name in _NUMBERS}
    for i, kl in enumerate(library.columns["kl"].tolist()):
        own = {name: column[i] for name, column in numbers.items()}
        for j, prompt in enumerate(story["prompts"]):
            for k, sign in enumerate(_SIGNS):
                row = {"source_layer": story["source_layer"], **own, "norm": norms[i]}
                text = story["completions"][i][j][k]
                yield {**row, "prompt": prompt, "sign": sign, "kl": kl[j][k], "completion": text}
