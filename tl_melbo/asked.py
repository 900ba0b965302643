"""What a command was asked for, as a discovery method takes it; none is known by name here."""

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tl_melbo.discovery._melbo import Radius
    from tl_melbo.discovery._search import Method

# Arguments of a method that are no options of a command.
_OWN = ("f", "n_vectors", "previous", "progress", "on_step")


def method(name: str) -> "Method":
    """The discovery method of that name: any that the package exports.

    Raises:
        ValueError: there is none.
    """
    import tl_melbo as tm
    from tl_melbo.discovery._search import Method

    known = {n: value for n, value in vars(tm).items() if isinstance(value, Method)}
    if name not in known:
        raise ValueError(f"--method={name!r}: known are {', '.join(sorted(known))}")
    return known[name]


def given(method: "Method", n_vectors: int, **options: Any) -> dict[str, Any]:
    """The options that were given, after the method's own check of them.

    Raises:
        ValueError: it does not take one of them, or lacks one, or a number is out of its range.
    """
    given = {name: value for name, value in options.items() if value is not None}
    taken = {n: p for n, p in inspect.signature(method).parameters.items() if n not in _OWN}
    name = method.__name__
    for option in given:
        if option not in taken:
            raise ValueError(
                f"--{option}: --method {name} does not take it; it takes {', '.join(taken)}"
            )
    for option, parameter in taken.items():
        if parameter.default is parameter.empty and option not in given:
            command = "use tl-melbo ortho" if option == "theta0" else f"pass --{option}"
            raise ValueError(f"--method {name}: needs {option}; {command}")
    check = getattr(method, "check", None)
    if check is not None:
        values = {**_defaults(method), **given, "n_vectors": n_vectors}
        names = inspect.signature(check).parameters
        check(**{each: value for each, value in values.items() if each in names})
    return given


def _defaults(method: "Method") -> dict[str, Any]:
    parameters = inspect.signature(method).parameters
    return {n: p.default for n, p in parameters.items() if p.default is not p.empty}


def story(method: "Method", settings: Mapping[str, Any]) -> dict[str, Any]:
    """What the metadata will say of a search, as far as that is known without a model."""
    from tl_melbo.story import slice_to_json

    chosen = {
        name: slice_to_json(value) if isinstance(value, slice) else value
        for name, value in {**_defaults(method), **settings}.items()
        if value is not None and name not in (*_OWN, "theta0")
    }
    seed = chosen.pop("seed", None)
    return {"method": method.__name__, "seed": seed, "hyperparameters": chosen}


def parse_slice(text: str | None) -> slice | None:
    """Read 'start:stop'; either may be missing.

    Raises:
        ValueError: it is something else.
    """
    if text is None:
        return None
    parts = text.split(":")
    try:
        start, stop = (int(part) if part.strip() else None for part in parts)
    except ValueError as error:
        raise ValueError(
            f"--positions={text!r}: expected start:stop, such as '-3:' for the last three tokens, "
            "or ':' for all"
        ) from error
    return slice(start, stop)


def parse_radius(text: str | None) -> "Radius | None":
    """Read a number or 'auto'.

    Raises:
        ValueError: it is something else.
    """
    if text is None or text == "auto":
        return text
    try:
        return float(text)
    except ValueError as error:
        raise ValueError(f"--radius={text!r}: expected a number, such as 12, or 'auto'") from error
