"""What all discovery methods share: a search, its parts, and one vector after another.

A method is a function from f and its settings to a `Search`; docs/add-a-method.md shows one.
"""

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, ParamSpec, Protocol, cast, runtime_checkable

import torch
from torch import Tensor
from tqdm.auto import tqdm

from tl_melbo.concatenation import one_after_another
from tl_melbo.discovery._arithmetic import arithmetic, warn_if_elsewhere
from tl_melbo.discovery._protocol import EffectMap
from tl_melbo.errors import DifferentSearch, NotFinite, place, told, warn_user
from tl_melbo.geometry import extended, normalise
from tl_melbo.shapes import shape_checked
from tl_melbo.story import differences, slice_to_json
from tl_melbo.story import make as make_story
from tl_melbo.vectors import SteeringVectors

Arguments = ParamSpec("Arguments")

# Starts are drawn one after another, so that this many take seconds.
MOST_VECTORS = 100_000
_LARGEST_COSINE = 1e-5
# A search whose first so many vectors are all lost is given up.
_MOST_LOST = 3
_ADVICE = "use a smaller radius, or a model in a wider type, such as dtype=torch.float32"


class Part(NamedTuple):
    """What a method found in one go: vectors with consecutive numbers.

    Attributes:
        first: the number of the first vector.
        vectors: [vector, d_model]; rows that are not finite are lost, and told of.
        columns: what was measured of each, by name; `index` is added.
        history: [vector, step], if there is one.
        broken: numbers of the prompts in which something was not finite.
    """

    first: int
    vectors: Tensor
    columns: Mapping[str, Tensor] = {}
    history: Tensor | None = None
    broken: frozenset[int] = frozenset()


# Gives the parts of a search; called with the vectors that are there, and the next one's number.
Find = Callable[[Tensor, int], Iterator[Part]]


class Search(Iterator[SteeringVectors]):
    """A search whose arguments are checked: it yields libraries, in order, as they are found.

    Args:
        method: its name.
        f: the activation map.
        n_vectors: how many to find beyond `previous`; None if the method itself knows the end.
        settings: the method's own arguments, as they are to stand in the story.
        find: does the work, part by part.
        previous: what is there already: vectors 0 to k-1 of the same search, all of them.
        needs: columns whose values must be finite, and which `previous` must have.
        orthogonal_to: vectors, by name, to which all must be orthogonal, as they are to each other;
            None where they need not be.
        nothing: what to say where not one vector is found.
        progress: show a progress bar.
        facts: what else the story tells, such as `seed`, `measure` and `about`.

    Attributes:
        story: the metadata of what will be found; complete before the search begins.

    Raises:
        DifferentSearch: `previous` is not the beginning of this search.
    """

    def __init__(
        self,
        method: str,
        f: EffectMap,
        n_vectors: int | None,
        settings: Mapping[str, Any],
        find: Find,
        *,
        previous: SteeringVectors | Tensor | None = None,
        needs: Sequence[str] = (),
        orthogonal_to: Mapping[str, Tensor] | None = None,
        nothing: str = "not one vector was found",
        progress: bool = False,
        **facts: Any,
    ) -> None:
        chosen = {
            name: slice_to_json(value) if isinstance(value, slice) else value
            for name, value in settings.items()
        }
        self.story = make_story(
            method, **f.story(), **facts, arithmetic=arithmetic(f.x.device), lost=[],
            hyperparameters={"n_vectors": n_vectors, **chosen},
        )  # fmt: skip
        self.n_vectors, self.nothing, self.progress = n_vectors, nothing, progress
        self.earlier = torch.empty(0, f.x.shape[-1], dtype=torch.float32)
        self.first = 0
        self._needs, self._find = needs, find
        if previous is not None and len(previous):
            self._continue(previous, orthogonal_to)
        self._parts = self._run()

    def __next__(self) -> SteeringVectors:
        return next(self._parts)

    def collect(self) -> SteeringVectors:
        """All that is found, as one library.

        Raises:
            ValueError: nothing is.
        """
        parts = list(self)
        if not parts:
            raise ValueError(self.nothing)
        return join(parts)

    def _continue(
        self, previous: SteeringVectors | Tensor, orthogonal_to: Mapping[str, Tensor] | None
    ) -> None:
        theirs: Mapping[str, Any] = {}
        vectors, numbers = previous, list(range(len(previous)))
        if isinstance(previous, SteeringVectors):
            theirs, vectors = previous.story, previous.vectors
            numbers = previous.columns["index"].tolist()
            lacking = [name for name in self._needs if name not in previous.columns]
        else:
            lacking = []
        vectors = cast(Tensor, vectors).detach().to("cpu", torch.float32)
        differing = differences(theirs, self.story)
        width, d_model = vectors.shape[1], self.earlier.shape[1]
        if differing:
            why = f"found with {', '.join(map(str, differing))}"
        elif width != d_model:
            why = f"{width} wide, where the residual stream is {d_model} wide"
        elif numbers != sorted(set(numbers)) or numbers[-1] >= MOST_VECTORS:
            why = "not in their order"
        elif _are_missing(numbers, theirs.get("lost")):
            some = ", ".join(map(str, numbers[:5]))
            why = f"holds vectors {some}..., not all from 0 on in their order"
        elif lacking:
            why = f"without the columns {', '.join(lacking)}"
        else:
            why = _no_basis(vectors, orthogonal_to)
        if why:
            raise DifferentSearch(
                f"previous: {why}; continue all that was found with the arguments that it was "
                "found with, or begin anew without it",
                differing,
                why,
            )
        self.earlier, self.first = vectors, numbers[-1] + 1
        self.story["lost"] = [n for n in theirs.get("lost") or [] if n < self.first]
        if self.n_vectors is not None:
            self.story["hyperparameters"]["n_vectors"] = self.first + self.n_vectors
        warn_if_elsewhere(theirs.get("arithmetic"), self.story["arithmetic"])

    def _run(self) -> Iterator[SteeringVectors]:
        n_found, lost, broken = len(self.earlier), [], set()
        if self.n_vectors == 0:
            return
        with tqdm(
            total=self.n_vectors, desc=self.story["method"], unit="vector",
            disable=not self.progress,
        ) as bar:  # fmt: skip
            for part in self._find(self.earlier, self.first):
                finite = self._finite(part)
                lost += (part.first + (~finite).nonzero().flatten()).tolist()
                broken |= part.broken
                n_found += int(finite.sum())
                if n_found and lost:
                    warn_user(f"{self._what_was_lost(lost, broken)}; they are left out. {_ADVICE}")
                    self.story["lost"] += lost
                    lost = []
                if finite.any():
                    bar.update(int(finite.sum()))
                    yield self._library(part, finite)
                elif not n_found and len(lost) >= _MOST_LOST:
                    break
        if lost and not n_found:
            raise NotFinite(f"{self._what_was_lost(lost, broken)}; {_ADVICE}", lost)

    def _finite(self, part: Part) -> Tensor:
        finite = part.vectors.isfinite().all(-1)
        for name in self._needs:
            finite &= part.columns[name].isfinite()
        return finite

    def _library(self, part: Part, finite: Tensor) -> SteeringVectors:
        columns = {"index": part.first + torch.arange(len(finite)), **part.columns}
        return SteeringVectors(
            part.vectors[finite],
            self.story,
            {name: column[finite] for name, column in columns.items()},
            None if part.history is None else part.history[finite],
        )

    def _what_was_lost(self, lost: list[int], broken: set[int]) -> str:
        where = place(self.story, sorted(broken))
        return (
            f"vectors {told(lost)}: the effect on {where}, its size or its gradient is not finite "
            "under them"
        )


@runtime_checkable
class Method(Protocol[Arguments]):
    """A discovery method: called, it gives all vectors; `parts` gives them as they are found."""

    __name__: str

    def __call__(self, *args: Arguments.args, **kwargs: Arguments.kwargs) -> SteeringVectors:
        """Search to the end."""
        ...

    def parts(self, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Search:
        """Check the arguments, and search as the result is iterated over."""
        ...


def method(
    function: Callable[Arguments, Search], check: Callable[..., None] | None = None
) -> Method[Arguments]:
    """Make a method of a function from f and settings to a `Search`.

    Its arguments are checked by their types and shapes. `function(f, ...)` then gives one library,
    `function.parts(f, ...)` the `Search`. By convention the map is called `f`, the number of
    vectors `n_vectors`, and what is there already `previous`: `Run.keep` passes these by name.
    `check` takes some of its settings and refuses wrong ones without a map: the command line calls
    it before it loads a model.
    """
    parts = shape_checked(function)
    parts.__doc__ = (
        f"Yield the vectors of `{function.__name__}` as they are found, so that each can be kept "
        f"as it comes.\n\nArguments are checked at the call. As `{function.__name__}`:\n\n"
        f"{inspect.getdoc(function) or ''}"
    )

    @functools.wraps(function)
    def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> SteeringVectors:
        return parts(*args, **kwargs).collect()

    whole = cast(Any, call)
    whole.__signature__ = inspect.signature(function).replace(return_annotation=SteeringVectors)
    whole.__annotations__ = {**function.__annotations__, "return": SteeringVectors}
    whole.parts, whole.check = parts, check
    return whole


@shape_checked
def join(parts: Sequence[SteeringVectors]) -> SteeringVectors:
    """Join consecutive parts of one search; every vector keeps its number.

    Args:
        parts: what `melbo.parts` or another method's yields, in order; the first may be what was
            kept before.

    Returns:
        One library with the story of the first part, and the number of vectors of the last.

    Raises:
        DifferentSearch: parts of other searches.
        ValueError: none given; or something that is not the next part.
    """
    if not parts:
        raise ValueError("parts: none given; pass at least one")
    first, last = parts[0], -1
    for number, part in enumerate(parts):
        differing = differences(part.story, first.story)
        if differing:
            raise DifferentSearch(
                f"parts[{number}]: differs in {', '.join(map(str, differing))}; pass parts of one "
                "search, or join others with concatenate",
                differing,
            )
        indices = part.columns["index"].tolist()
        if indices != sorted(set(indices)) or (indices and indices[0] <= last):
            raise ValueError(
                f"parts[{number}]: holds vectors {indices[:3]}..., but {last + 1} comes next; pass "
                "the parts in their order, and none twice"
            )
        last = indices[-1] if indices else last
    chosen = dict(first.story.get("hyperparameters") or {})
    chosen |= {"n_vectors": (parts[-1].story.get("hyperparameters") or {}).get("n_vectors")}
    lost = sorted({number for part in parts for number in part.story.get("lost", [])})
    # Columns that only later versions of this package write have their words in the last story.
    words = {**parts[-1].story.get("categories", {}), **first.story.get("categories", {})}
    known = {"lost": lost} if all("lost" in part.story for part in parts) else {}
    story = {**first.story, "hyperparameters": chosen, **known}
    return one_after_another(parts, {**story, "categories": words} if words else story)


def one_by_one(
    taken: Tensor, numbers: range, find: Callable[[int, Tensor], Part | None]
) -> Iterator[Part]:
    """Find vectors one after another, each orthogonal to those taken and to all before it.

    Args:
        taken: [vector, d_model], orthogonal to each other.
        numbers: of the vectors to find.
        find: number and orthonormal basis [rank, d_model] -> a part of one vector in the basis's
            orthogonal complement, or None where there is no more.
    """
    # In float64: after hundreds of float32 projections the cosines would show.
    basis = torch.empty(0, taken.shape[1], dtype=torch.float64)
    for vector in taken:
        basis = extended(basis, vector)
    for number in numbers:
        part = find(number, basis)
        if part is None:
            return
        if part.vectors.isfinite().all():
            # The float32 vector that is handed out is what the next ones are orthogonal to.
            basis = extended(basis, part.vectors[0])
        yield part


def check_count(
    n_vectors: int, f: EffectMap | None = None, previous: SteeringVectors | None = None
) -> None:
    """Check the number of vectors, and, with a map, that so many can be orthogonal.

    Raises:
        ValueError: too few or too many.
    """
    # A search that is continued may have no vector left to find.
    least = 1 if previous is None else 0
    if not least <= n_vectors <= MOST_VECTORS:
        raise ValueError(f"n_vectors={n_vectors}: must be from {least} to {MOST_VECTORS:,}")
    known = 0 if previous is None else len(previous)
    if f is not None and known + n_vectors > f.x.shape[-1]:
        raise ValueError(
            f"n_vectors={n_vectors}: at most d_model={f.x.shape[-1]} vectors can be orthogonal "
            f"to each other{f', and {known} are there already' if known else ''}; ask for fewer"
        )


def _are_missing(numbers: list[int], lost: Any) -> bool:
    """Whether there are gaps that are not those of lost vectors; version 0.1 did not tell these."""
    known = lost if isinstance(lost, list) else range(MOST_VECTORS) if lost is None else []
    return not set(range(numbers[-1])) <= {*numbers, *known}


def _no_basis(vectors: Tensor, orthogonal_to: Mapping[str, Tensor] | None) -> str:
    """Why vectors are not orthogonal to each other and to some others; nothing if they are."""
    norms = vectors.norm(dim=-1)
    bad = (~((norms > 0) & norms.isfinite())).nonzero().flatten().tolist()
    if bad:
        return f"vectors {told(bad)} are zero or not finite"
    if orthogonal_to is None:
        return ""
    units = normalise(torch.cat([torch.stack([*orthogonal_to.values(), *vectors])]).double())
    cosines = (units @ units.T - torch.eye(len(units), dtype=torch.float64)).abs()
    largest = float(cosines.max())
    if largest <= _LARGEST_COSINE:
        return ""
    names = [*orthogonal_to, *(f"vector {i}" for i in range(len(vectors)))]
    one, other = sorted(divmod(int(cosines.argmax()), len(units)))
    return (
        f"{names[one]} and {names[other]} are not orthogonal to each other (|cosine| "
        f"{largest:.1e}, allowed {_LARGEST_COSINE:.0e})"
    )
