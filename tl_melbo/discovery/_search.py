"""What all discovery methods share: a search and its parts; see docs/add-a-method.md."""

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, ParamSpec, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor
from tqdm.auto import tqdm

from tl_melbo import checks, story
from tl_melbo.concatenation import one_after_another
from tl_melbo.discovery._map import EffectMap
from tl_melbo.errors import DifferentSearch, NotFinite, place, told, warn_user
from tl_melbo.geometry import extended, normalise
from tl_melbo.shapes import Float, shape_checked
from tl_melbo.stored import Library
from tl_melbo.vectors import SteeringVectors

Arguments = ParamSpec("Arguments")
Found = TypeVar("Found", bound=Library)

# Starts are drawn one after another, so that this many take seconds.
MOST_VECTORS = 100_000
_LARGEST_COSINE = 1e-5
# A search whose first so many vectors are all lost is given up.
_MOST_LOST = 3


class Part(NamedTuple):
    """What a method found in one go: vectors with consecutive numbers.

    Rows that are not finite are lost, and told of. The column `index` is added.
    """

    first: int
    vectors: Float[Tensor, "vector d_model"]
    columns: Mapping[str, Tensor] = {}
    history: Float[Tensor, "vector step"] | None = None


class Parts(Iterator[Found]):
    """What is found, one part after the other; its `story` is complete before any work."""

    def __init__(self, story: dict[str, Any], parts: Iterator[Found]) -> None:
        self.story, self._parts = story, parts

    def __next__(self) -> Found:
        return next(self._parts)

    def collect(self) -> Found:
        """All that is found, as one library."""
        return join(list(self))


class Search(Parts[SteeringVectors]):
    """A search that yields libraries, in order, as they are found.

    Args:
        n_vectors: how many beyond `previous`; None if the method itself knows the end.
        settings: for the metadata.
        find: the vectors that are there, and the next one's number -> the parts.
        needs: columns that must be finite, and which `previous` must have.
        orthogonal_to: vectors, by name, to which all are orthogonal, as they are to each other;
            None where they need not be.
        together: all vectors are found together, so that fewer or more of them are others.
        nothing: the error where not one vector is found.
        facts: what else the metadata tells, such as `seed`, `measure` and `about`.
    """

    def __init__(
        self,
        method: str,
        f: EffectMap,
        n_vectors: int | None,
        settings: Mapping[str, Any],
        find: Callable[[Tensor, int], Iterator[Part]],
        *,
        previous: SteeringVectors | None = None,
        needs: Sequence[str] = (),
        orthogonal_to: Mapping[str, Tensor] | None = None,
        together: bool = False,
        nothing: str = "not one vector was found",
        progress: bool = False,
        **facts: Any,
    ) -> None:
        chosen: dict[str, Any] = {"n_vectors": n_vectors}
        for name, value in settings.items():
            chosen[name] = story.slice_to_json(value) if isinstance(value, slice) else value
        facts = {**f.story(), **facts, "arithmetic": _arithmetic(f.x.device), "lost": []}
        super().__init__(story.make(method, **facts, hyperparameters=chosen), self._run())
        self.n_vectors, self.nothing, self.progress = n_vectors, nothing, progress
        self.together = together
        self.on_share: Callable[[float], None] = lambda share: None
        self.earlier, self.first = torch.empty(0, f.x.shape[-1], dtype=torch.float32), 0
        self._needs, self._find = needs, find
        most, least, why = MOST_VECTORS, int(previous is None), ""
        if orthogonal_to is not None:
            taken, d_model = len(orthogonal_to) + len(previous or ()), f.x.shape[-1]
            most = d_model - taken
            why = f"; at most d_model={d_model} vectors can be orthogonal"
            why += f", and {taken} are taken" if taken else ""
            why += "; ask for fewer"
        if n_vectors is not None and not least <= n_vectors <= most:
            raise ValueError(f"n_vectors={n_vectors}: must be from {least} to {most:,}{why}")
        if previous is not None and len(previous):
            self._continue(previous, orthogonal_to)
            self.check_total(n_vectors and self.first + n_vectors)
        self._bar: tqdm[Any] | None = None

    def check_total(self, n_vectors: int | None) -> None:
        """Raise where vectors that were found together are wanted in another number in all."""
        if self.together and self.first and n_vectors not in (0, None, self.first):
            why = f"all {self.first} were found together, and {n_vectors} are wanted"
            raise DifferentSearch(
                f"previous: {why}; begin anew without it, or ask for the number that is there",
                [],
                f"of which {why}",
            )

    def show(self, share: float) -> None:
        """Move the bar: a method that finds all in one go tells what share of the work is done."""
        self.on_share(share)
        if self._bar is not None and self.n_vectors is not None:
            self._bar.update(int(share * self.n_vectors) - self._bar.n)

    def collect(self) -> SteeringVectors:
        """All that is found, as one library; a ValueError if nothing is."""
        if not (parts := list(self)):
            raise ValueError(self.nothing)
        return join(parts)

    def _continue(
        self, previous: SteeringVectors, orthogonal_to: Mapping[str, Tensor] | None
    ) -> None:
        theirs, vectors = previous.story, previous.vectors
        numbers, lost = previous.columns["index"].tolist(), theirs.get("lost")
        differing = story.differences(theirs, self.story)
        lacking = [name for name in self._needs if theirs and name not in previous.columns]
        width, d_model = vectors.shape[1], self.earlier.shape[1]
        why = ""
        if differing:
            why = f"found with {', '.join(map(str, differing))}"
        elif width != d_model:
            why = f"{width} wide, where the residual stream is {d_model} wide"
        elif numbers != sorted(set(numbers)) or numbers[-1] >= MOST_VECTORS:
            why = "not in their order"
        # Version 0.1 did not tell which vectors were lost.
        elif lost is not None and set(range(numbers[-1])) - {*numbers, *lost}:
            why = f"holds vectors {told(numbers)}, not all from 0 on in their order"
        elif lacking:
            why = f"without the columns {', '.join(lacking)}"
        elif orthogonal_to is not None:
            why = _not_orthogonal(vectors, orthogonal_to)
        if why:
            advice = "continue all that was found with the arguments that it was found with"
            message = f"previous: {why}; {advice}, or begin anew without it"
            raise DifferentSearch(message, differing, why)
        self.earlier, self.first = vectors, numbers[-1] + 1
        self.story["lost"] = [number for number in lost or [] if number < self.first]
        if self.n_vectors is not None:
            self.story["hyperparameters"]["n_vectors"] = self.first + self.n_vectors
        if theirs.get("arithmetic"):
            _warn_if_elsewhere(theirs["arithmetic"], self.story["arithmetic"])

    def _run(self) -> Iterator[SteeringVectors]:
        if self.n_vectors == 0:
            return
        n_found, n_new, lost = len(self.earlier), 0, []
        shown = {"desc": self.story["method"], "unit": "vector", "disable": not self.progress}
        with tqdm(total=self.n_vectors, **shown) as self._bar:
            for part in self._find(self.earlier, self.first):
                finite = part.vectors.isfinite().all(-1)
                for column in self._needs:
                    finite &= part.columns[column].isfinite()
                lost += (part.first + (~finite).nonzero().flatten()).tolist()
                n_new += int(finite.sum())
                n_found += int(finite.sum())
                if n_found and lost:
                    warn_user(self._what_was_lost(lost))
                    self.story["lost"] += lost
                    lost = []
                if finite.any():
                    self._bar.update(n_new - self._bar.n)
                    yield self._library(part, finite)
                elif len(lost) >= _MOST_LOST:
                    break
        if lost:
            raise NotFinite(self._what_was_lost(lost), lost)

    def _library(self, part: Part, finite: Tensor) -> SteeringVectors:
        columns = {"index": part.first + torch.arange(len(finite)), **part.columns}
        columns = {name: column[finite] for name, column in columns.items()}
        history = None if part.history is None else part.history[finite]
        return SteeringVectors(part.vectors[finite], self.story, columns, history)

    def _what_was_lost(self, lost: list[int]) -> str:
        where = place(self.story, range(len(self.story.get("prompts") or [])))
        return (
            f"vectors {told(lost)}: the effect on {where}, its size or its gradient is not finite "
            "under them; they are left out. Use a smaller radius, or a model in a wider type, such "
            "as dtype=torch.float32"
        )


@runtime_checkable
class Method(Protocol[Arguments]):
    """A discovery method: called, it gives all vectors; `parts` gives them as they are found."""

    __name__: str

    def __call__(self, *args: Arguments.args, **kwargs: Arguments.kwargs) -> SteeringVectors: ...
    def parts(self, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Search: ...


def method(
    function: Callable[Arguments, Search], check: Callable[..., None] | None = None
) -> Method[Arguments]:
    """Make a method of a function from f and settings to a `Search`; checks types and shapes.

    `Run.keep` passes `f`, `n_vectors` and `previous` by name. `check` takes some of the settings,
    and refuses wrong ones before a model is loaded.
    """
    whole = collecting(function, SteeringVectors)
    whole.check = check
    return whole


def collecting(function: Callable[..., Any], kind: type) -> Any:
    """Of a function to a search: called, it collects what is found; `parts` gives the search."""
    parts = shape_checked(function)
    described = inspect.getdoc(function) or ""
    parts.__doc__ = f"Check the arguments, and yield what is found as it comes.\n\n{described}"

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return parts(*args, **kwargs).collect()

    whole: Any = call
    whole.__signature__ = inspect.signature(function).replace(return_annotation=kind)
    whole.__annotations__ = {**function.__annotations__, "return": kind}
    whole.parts = parts
    return whole


@shape_checked
def join(parts: Sequence[Library]) -> Any:
    """Join consecutive parts of one search, or of one training; each row keeps its number."""
    if not parts:
        raise ValueError("parts: none given; pass at least one")
    first, last, expected = parts[0].story, parts[-1].story, 0
    for number, part in enumerate(parts):
        differing = story.differences(part.story, first)
        if differing:
            advice = "pass parts of one search, or join others with concatenate"
            raise DifferentSearch.of(f"parts[{number}]", differing, advice)
        indices = part.columns["index"].tolist()
        if indices != sorted(set(indices)) or (indices and indices[0] < expected):
            raise ValueError(
                f"parts[{number}]: holds {part.kind.rows} {indices[:3]}..., but {expected} comes "
                "next; pass the parts in their order, and none twice"
            )
        expected = indices[-1] + 1 if indices else expected
    chosen, count = (each.get("hyperparameters") or {} for each in (first, last))
    if "n_vectors" in count:
        chosen = {**chosen, "n_vectors": count["n_vectors"]}
    joined = {**first, "hyperparameters": chosen}
    if all("lost" in part.story for part in parts):
        joined["lost"] = sorted({number for part in parts for number in part.story["lost"]})
    # Later versions write more columns, whose words are in the last story.
    words = {**last.get("categories", {}), **first.get("categories", {})}
    return one_after_another(parts, {**joined, "categories": words} if words else joined)


def one_by_one(
    taken: Tensor, numbers: range, find: Callable[[int, Tensor], Part | None]
) -> Iterator[Part]:
    """Find vectors one after another, each orthogonal to those taken and to all before it.

    `find` is from a number and an orthonormal basis, [rank, d_model], to a part of one vector in
    the basis's complement, or None where there is no more.
    """
    # In float64: after hundreds of float32 projections the cosines would show.
    basis = torch.empty(0, taken.shape[1], dtype=torch.float64)
    for vector in taken:
        basis = extended(basis, vector)
    for number in numbers:
        if (part := find(number, basis)) is None:
            return
        if part.vectors.isfinite().all():
            # The float32 vector that is handed out is what the next ones are orthogonal to.
            basis = extended(basis, part.vectors[0])
        yield part


def _not_orthogonal(vectors: Tensor, others: Mapping[str, Tensor]) -> str:
    checks.directions(vectors, "previous")
    units = normalise(torch.stack([*others.values(), *vectors]).double())
    cosines = (units @ units.T - torch.eye(len(units), dtype=torch.float64)).abs()
    if float(cosines.max()) <= _LARGEST_COSINE:
        return ""
    names = [*others, *(f"vector {i}" for i in range(len(vectors)))]
    one, other = sorted(divmod(int(cosines.argmax()), len(units)))
    return f"{names[one]} and {names[other]} are not orthogonal to each other"


def _arithmetic(device: torch.device) -> dict[str, Any]:
    """What the last digits of a result depend on, beside the versions."""
    cpu = torch.backends.cpu.get_cpu_capability()
    facts = {"threads": torch.get_num_threads(), "cpu": cpu, "device": device.type}
    return facts | {"gpu": torch.cuda.get_device_name(device)} if device.type == "cuda" else facts


def _warn_if_elsewhere(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    names = [name for name in {**theirs, **ours} if theirs.get(name) != ours.get(name)]
    differing = ", ".join(f"{name}={theirs.get(name)} (here {ours.get(name)})" for name in names)
    if differing:  # how far apart: see docs/numbers.md
        warn_user(
            f"previous: found with {differing}. The search goes on, but not bit for bit: vectors "
            "differed by 0.01% (MELBO) to 0.6% (MELBO-ortho) of their norm where this was measured"
        )
