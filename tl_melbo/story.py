"""A library's metadata: how it was found, whether two searches are the same, what was measured."""

import math
import platform
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

# What two parts of one search have in common, beside their hyperparameters.
_FACTS = (
    "method", "model", "weights", "prompts", "chat", "dtype", "n_hooks", "source_layer",
    "target_layer", "seed",
)  # fmt: skip
# How many vectors there are, or were to be: a search goes on with another number.
_COUNTS = ("n_vectors", "n_previous")


class Difference(NamedTuple):
    """One fact that tells two searches apart."""

    name: str
    theirs: Any
    ours: Any

    def __str__(self) -> str:
        return f"{self.name}={self.theirs!r} (here {self.ours!r})"


def make(method: str, **facts: Any) -> dict[str, Any]:
    """The metadata of a library: its method, the facts given, the versions of what ran, the date.

    Facts that others read, whatever the method: `measure`, a mapping with the column that tells
    how well each vector did, its `label` and `unit`, what the history `counts`, and the number of
    its `first` entry; and `about`, a sentence on how the vectors were found.
    """
    return {"method": method, **facts, "versions": _versions(), "date": now()}


def differences(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> list[Difference]:
    """What tells two searches apart; nothing if one may go on where the other ended.

    Facts that only one of them knows do not count: earlier versions told less, and what is asked
    for before a model is loaded cannot tell all.
    """
    pairs = {name: (theirs.get(name), ours.get(name)) for name in _FACTS}
    if theirs.get("precision") is not None:
        # Version 0.1 could multiply matrices in a narrower type than the model's.
        pairs["precision"] = theirs["precision"], ours.get("precision", "float32")
    found = [
        Difference(name, *pair)
        for name, pair in pairs.items()
        if None not in pair and pair[0] != pair[1]
    ]
    chosen = [story.get("hyperparameters") or {} for story in (theirs, ours)]
    for name in chosen[0]:
        if name in chosen[1] and name not in _COUNTS and chosen[0][name] != chosen[1][name]:
            found.append(Difference(name, chosen[0][name], chosen[1][name]))
    one, other = ((story.get("theta0") or {}).get("norm") for story in (theirs, ours))
    # Other arithmetic sums the same vector to another last digit.
    if one is not None and other is not None and not math.isclose(one, other, rel_tol=1e-5):
        found.append(Difference("norm of theta0", one, other))
    return found


def measure_of(story: Mapping[str, Any]) -> dict[str, Any] | None:
    """What was measured of each vector: column, label, unit, counts, first; None if nothing was.

    Libraries of version 0.1 do not say it; what they hold is known by their method.
    """
    if "measure" in story:
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
) -> dict[str, Any]:
    """The fact `measure` of a story; without a unit it is the residual stream's."""
    unit = "residual-stream units" if unit is None else unit
    return {"column": column, "label": label, "unit": unit, "counts": counts, "first": first}


def about_of(story: Mapping[str, Any]) -> str:
    """A sentence on how the vectors were found, or nothing where that is not known."""
    known = {
        "melbo": "Each vector changes the target layer as much as a vector of its norm can "
        "(MELBO).",
        "melbo_ortho": "Each vector has the effect of theta0 and is orthogonal to theta0 and to "
        "all before it (MELBO-ortho).",
    }
    return str(story.get("about") or known.get(str(story.get("method")), ""))


def slice_to_json(positions: slice) -> list[int | None]:
    """A slice as a list of start, stop and step."""
    parts = (positions.start, positions.stop, positions.step)
    return [None if part is None else int(part) for part in parts]


def slice_from_json(parts: Any) -> slice:
    """The slice that `slice_to_json` wrote; all positions where it wrote none."""
    return slice(*parts) if isinstance(parts, list) and len(parts) == 3 else slice(None)


def slice_text(positions: slice) -> str:
    """A slice as Python writes it between brackets: "-3:"."""
    parts = (positions.start, positions.stop, positions.step)
    start, stop, step = ("" if part is None else str(part) for part in parts)
    return f"{start}:{stop}" + (f":{step}" if step else "")


def now() -> str:
    """The date and time, to the second, in UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in ("tl-melbo", "torch", "transformer-lens", "transformers"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "unknown"
    return versions
