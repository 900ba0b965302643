"""What a shell asks for: a method by its name, and settings from words."""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from types import NoneType, UnionType
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin

import tl_melbo as tm
from tl_melbo import checks
from tl_melbo.discovery import Method
from tl_melbo.story import slice_to_json
from tl_melbo.text import did_you_mean

# Arguments of a method that a command or a sweep makes itself.
OWN = ("f", "previous", "progress", "on_step")


class Asked(NamedTuple):
    """What was asked of a method: the settings that were given, and what follows from them.

    `story` is what the metadata will say, as far as is known without a model; `other` are the
    prompts of the method's second map.
    """

    n_vectors: int
    settings: dict[str, Any]
    other: list[str]
    story: dict[str, Any]


def read(text: str, kind: Any, option: str) -> Any:
    """The value of a type, such as `float | None`, that a text stands for; a ValueError if none."""
    try:
        return _read(text, _choices(kind))
    except ValueError as error:
        raise ValueError(f"--{option}={text!r}: {error}") from None


def scales_asked(text: str | None) -> list[float] | None:
    """The scales that `--scales` stands for."""
    if text == "nine":
        from tl_melbo.analysis._completions import DEFAULT_SCALES  # pandas takes long to import

        return [*DEFAULT_SCALES]
    try:
        scales = text and [float(part) for part in text.split(",")]
    except ValueError:
        scales = [math.nan]
    if scales and not all(map(math.isfinite, scales)):
        told = "expected numbers with commas between them, such as 0.5,1,2, or nine"
        raise ValueError(f"--scales={text!r}: {told}")
    return scales or None


def method_named(name: str) -> Method:
    """A method of the package."""
    known = methods()
    if name not in known:
        hint = did_you_mean(name, known)
        told = f"known are {', '.join(sorted(known))}"
        raise ValueError(f"--method={name!r}: {f'{hint} ' if hint else ''}{told}")
    return known[name]


def methods() -> dict[str, Method]:
    """The package's methods by name; adapters are found in parts, too, but not in a map f."""
    found = {name: value for name, value in vars(tm).items() if isinstance(value, Method)}
    return {n: each for n, each in found.items() if "f" in inspect.signature(each).parameters}


def asked(
    method: Method,
    flags: Mapping[str, Any],
    assignments: Sequence[str] = (),
    other: Sequence[str] = (),
    **given: Any,
) -> Asked:
    """Read and check what is asked of a method, before a model is loaded.

    Args:
        flags: settings by name, as words or numbers; None where one is not given.
        assignments: more of them, each as "NAME=VALUE".
        given: arguments that no word can say.
    """
    parameters = inspect.signature(method).parameters
    settings = _settings(method, flags, assignments)
    n_vectors = settings.pop("n_vectors", parameters["n_vectors"].default)
    defaults = {n: p.default for n, p in parameters.items() if p.default is not p.empty}
    values = {**defaults, **given, **settings, "n_vectors": n_vectors}
    prompts = _other_prompts(method, other)
    for name in parameters:
        if name not in (*values, *OWN, *(["other"] if prompts else [])):
            raise ValueError(f"--method {method.__name__}: needs {_how_to_give(name)}")
    if check := getattr(method, "check", None):
        check(**{name: values[name] for name in inspect.signature(check).parameters})
    chosen = {
        name: slice_to_json(value) if isinstance(value, slice) else value
        for name, value in values.items()
        if value is not None and name not in (*OWN, *given)
    }
    story = {"method": method.__name__, "seed": chosen.pop("seed", None), "hyperparameters": chosen}
    return Asked(n_vectors, {**given, **settings}, prompts, story | {"other": prompts or None})


def _how_to_give(name: str) -> str:
    if name == "other":
        return "other prompts, to compare with; pass --other PROMPT, once for each"
    return f"{name}; {'use tl-melbo ortho' if name == 'theta0' else 'use it in Python'}"


def _other_prompts(method: Method, other: Sequence[str]) -> list[str]:
    if other and not _takes_other(method):
        which = ", ".join(name for name, each in methods().items() if _takes_other(each))
        raise ValueError(
            f"--other: --method {method.__name__} takes no other prompts; leave it out, or take a "
            f"method that does: {which}"
        )
    return checks.as_texts(other, "other") if other else []


def _takes_other(method: Method) -> bool:
    return "other" in inspect.signature(method).parameters


def _settings(
    method: Method, flags: Mapping[str, Any], assignments: Sequence[str]
) -> dict[str, Any]:
    """The settings that were given, either way, as the method's signature has them."""
    kinds = {
        name: _choices(parameter.annotation)
        for name, parameter in inspect.signature(method).parameters.items()
        if name not in OWN and _choices(parameter.annotation)
    }
    texts = {name: str(value) for name, value in flags.items() if value is not None}
    called = {name: f"--{name.replace('_', '-')}" for name in texts}
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        name = name.strip().replace("-", "_")
        if not (name and equals):
            raise ValueError(f"--set {assignment!r}: expected NAME=VALUE, such as --set seed=1")
        if name in texts:
            raise ValueError(f"--set {name}: given twice, {called[name]} before; give it once")
        texts[name], called[name] = text.strip(), f"--set {name}"
    for name in texts:
        if name not in kinds:
            hint = did_you_mean(name, kinds) or f"it has {', '.join(kinds)}"
            raise ValueError(
                f"{called[name]}: --method {method.__name__} has no such setting; {hint}"
            )
    settings = {}
    for name, text in texts.items():
        try:
            settings[name] = _read(text, kinds[name])
        except ValueError as error:
            is_switch = isinstance(flags.get(name), bool)
            told = f"{called[name]}: {error} for --method {method.__name__}; pass --set {name}=..."
            raise ValueError(told if is_switch else f"{called[name]}={text!r}: {error}") from None
    return settings


def _choices(kind: Any) -> list[Any]:
    """The types and words among what an argument may be that a shell can give."""
    members = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    words = [word for each in members if get_origin(each) is Literal for word in get_args(each)]
    types = [each for each in _TYPES if each in members]
    return [*types, *words] if words or types not in ([], [NoneType]) else []


def _read(text: str, choices: Sequence[Any]) -> Any:
    words = {str(choice): choice for choice in choices if not isinstance(choice, type)}
    if text in words:
        return words[text]
    types = [choice for choice in choices if isinstance(choice, type)]
    for kind in types:
        with suppress(ValueError, KeyError):
            return _TYPES[kind][0](text)
    *some, last = [*(_TYPES[kind][1] for kind in types), *map(repr, words)]
    allowed = f"{', '.join(some)}, or {last}" if some else last
    hint = did_you_mean(text, words)
    raise ValueError(f"expected {allowed}{f'; {hint}' if hint else ''}")


def _slice(text: str, most: int) -> slice:
    """Read 'start:stop' or, of at `most` 3, 'start:stop:step'; each may be missing."""
    parts = [int(part) if part.strip() else None for part in text.split(":")]
    if not 2 <= len(parts) <= most or parts[2:] == [0]:
        raise ValueError
    return slice(*parts)


_SWITCH = {"true": True, "yes": True, "false": False, "no": False}
# How a text is read as each type, in this order, and what is expected of it.
_TYPES: Mapping[type, tuple[Callable[[str], Any], str]] = {
    bool: (lambda text: _SWITCH[text.lower()], "true or false"),
    int: (int, "a whole number"),
    float: (float, "a number"),
    slice: (
        lambda text: _slice(text, 2),
        "start:stop, such as '-3:' for the last three tokens, or ':' for all",
    ),
    range: (lambda text: _slice(text, 3), "start:stop or start:stop:step"),
    NoneType: (lambda text: {"none": None}[text.lower()], "none"),
    str: (str, "a text"),
}  # fmt: skip
