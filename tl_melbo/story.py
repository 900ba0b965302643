"""A library's metadata: how it was found, whether two searches are the same, what was measured."""

import math
import platform
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

# What two parts of one search have in common, beside their hyperparameters.
_FACTS = (
    "method", "model", "weights", "prompts", "chat", "dtype", "n_hooks", "source_layer",
    "target_layer", "seed", "other",
)  # fmt: skip
# How many vectors there are, or were to be: a search goes on with another number.
_COUNTS = ("n_vectors", "n_previous")
_PACKAGES = ("tl-melbo", "torch", "transformer-lens", "transformers")
_ABOUT = {
    "melbo": "The search climbs towards vectors that change the target layer most (MELBO).",
    "melbo_ortho": "Each vector has the effect of theta0 and is orthogonal to theta0 and to all "
    "before it (MELBO-ortho).",
}

# What a reader knows them by; a method that is not here goes by its own name.
_METHODS = {"melbo": "MELBO", "melbo_ortho": "MELBO-ortho", "dct": "DCT"}
# Each with what its steps are.
_OPTIMISERS = {
    "ascent": ("power iteration", "gradients"),
    "quasi-newton": ("L-BFGS", "steps"),
    "adamw": ("AdamW", "steps"),
    "adam": ("Adam", "steps"),
}


class Difference(NamedTuple):
    """One fact that tells two searches apart."""

    name: str
    theirs: Any
    ours: Any

    def __str__(self) -> str:
        return f"{self.name}={self.theirs!r} (here {self.ours!r})"


def make(method: str, **facts: Any) -> dict[str, Any]:
    """The metadata of a library: its method, these facts, the versions of what ran, the date."""
    versions = {"python": platform.python_version()}
    return {
        "method": method,
        **facts,
        "versions": versions | {name: _version(name) for name in _PACKAGES},
        "date": now(),
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


def differences(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> list[Difference]:
    """What tells two searches apart; nothing if one may go on where the other ended.

    Facts that only one of them knows do not count: earlier versions told less, and what is asked
    for before a model is loaded cannot tell all.
    """
    pairs = {name: (theirs.get(name), ours.get(name)) for name in _FACTS}
    if theirs.get("precision") is not None:
        # Version 0.1 could multiply matrices in a narrower type than the model's.
        pairs["precision"] = theirs["precision"], ours.get("precision", "float32")
    one, other = (story.get("hyperparameters") or {} for story in (theirs, ours))
    shared = [name for name in one if name in other and name not in _COUNTS]
    found = [
        Difference(name, *pair)
        for name, pair in pairs.items()
        if None not in pair and pair[0] != pair[1]
    ]
    found += [Difference(n, one[n], other[n]) for n in shared if one[n] != other[n]]
    norms: list[Any] = [(story.get("theta0") or {}).get("norm") for story in (theirs, ours)]
    # Other arithmetic sums the same vector to another last digit.
    if None not in norms and not math.isclose(*norms, rel_tol=1e-5):
        found.append(Difference("norm of theta0", *norms))
    return found


def measure_of(story: Mapping[str, Any]) -> dict[str, Any] | None:
    """What was measured of each vector, as `measure` made it; of version 0.1, by the method."""
    if story.get("measure"):
        return dict(story["measure"])
    chosen = story.get("hyperparameters") or {}
    if story.get("method") == "melbo_ortho":
        return measure("distance", "distance |z − z₀|")
    if story.get("method") != "melbo":
        return None
    unit = None if chosen.get("p") == chosen.get("q") else f"p = {chosen['p']}, q = {chosen['q']}"
    if chosen.get("optimiser") == "adamw":
        return measure("objective", "objective", unit, counts="step", first=0)
    return measure("objective", "objective", unit)


def measure(
    column: str,
    label: str,
    unit: str | None = None,
    counts: str = "gradient evaluations",
    first: int = 1,
    history: str | None = None,
) -> dict[str, Any]:
    """The fact `measure` of a story: the column that tells how well each vector did.

    Args:
        unit: None is the residual stream's.
        counts: what each entry of the history stands for.
        first: the number of the history's first entry.
        history: label and unit of the history, where it is of something else than the column.
    """
    unit = "residual-stream units" if unit is None else unit
    made = {"column": column, "label": label, "unit": unit, "counts": counts, "first": first}
    return made if history is None else made | {"history": history}


def about_of(story: Mapping[str, Any]) -> str:
    """A sentence on how the vectors were found, or nothing where that is not known."""
    return str(story.get("about") or _ABOUT.get(str(story.get("method")), ""))


def method_of(story: Mapping[str, Any]) -> str | None:
    """How a library was found, in a reader's words: "MELBO, power iteration (10 gradients)"."""
    name, chosen = story.get("method"), story.get("hyperparameters") or {}
    if not name:
        return None
    known = _METHODS.get(str(name), str(name).replace("_", " ").capitalize())
    optimiser, steps = chosen.get("optimiser"), chosen.get("steps")
    if not optimiser:
        return known
    told, counts = _OPTIMISERS.get(str(optimiser), (str(optimiser), "steps"))
    return f"{known}, {told}" + (f" ({steps} {counts})" if steps else "")


def model_of(story: Mapping[str, Any]) -> str | None:
    """The model's name: a hub id as it is, the last part of a path, without ".gguf"."""
    name = str(story.get("model") or "")
    is_path = name.startswith((".", "/", "~")) or "\\" in name or name.count("/") > 1
    if is_path:
        name = re.split(r"[/\\]", name.rstrip("/\\"))[-1]
    return name.removesuffix(".gguf") or None


def slice_to_json(positions: slice) -> list[int | None]:
    """A slice as a list of start, stop and step."""
    parts = (positions.start, positions.stop, positions.step)
    return [None if part is None else int(part) for part in parts]


def slice_from_json(parts: Any) -> slice:
    """The slice that `slice_to_json` wrote; all positions where it wrote none."""
    return slice(*parts) if isinstance(parts, list) and len(parts) == 3 else slice(None)


def slice_text(positions: slice) -> str:
    """A slice as Python writes it between brackets: "-3:"."""
    parts = ("" if part is None else str(part) for part in slice_to_json(positions))
    start, stop, step = parts
    return f"{start}:{stop}" + (f":{step}" if step else "")


def now() -> str:
    """The date and time, to the second, in UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")
