"""What a reader noted on a page: stars, names, remarks. A file of theirs is checked before use."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tl_melbo.errors import Damaged
from tl_melbo.shapes import shape_checked
from tl_melbo.text import printable

VERSION = 1
_LARGEST_FILE = 5_000_000
_MOST = 10_000
_LONGEST = {"name": 200, "note": 10_000}
_ADVICE = "pass the notes.json that a page exported"
# A vector, or with a minus its negative; of several prompts, a row of the second is "4p2"; its
# third sample is "4p2s3".
_VECTOR = re.compile(r"[0-9]{1,9}-?")
_NOTES = re.compile("version|vectors|behaviours")
_ENTRY, _BEHAVIOUR = re.compile("star|name|note"), re.compile("star|name|note|members|merged")
_ROW = re.compile(r"[0-9]{1,9}-?(p[0-9]{1,4})?(s[0-9]{1,4})?")

Notes = Mapping[str, Any]


@shape_checked
def read_notes(path: str | Path) -> dict[str, Any]:
    """Read the `notes.json` that a page exported.

    Returns:
        version; vectors, by number ("4", or "4-" for its negative); behaviours, a list. Each may
        have star, name and note. A behaviour has members, the rows it was made of (or the samples,
        where no greedy completion is in it), and merged, the members of groups put into it.

    Raises:
        FileNotFoundError: there is no such file.
        Damaged: not such a file, or larger than 5 MB.
    """
    path = Path(path).expanduser()
    try:
        size = path.stat().st_size
        if size > _LARGEST_FILE:
            raise ValueError(f"{size:,} bytes, at most {_LARGEST_FILE:,}")
        return checked_notes(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, RecursionError) as error:
        reason = str(error).removesuffix(f"; {_ADVICE}")
        raise Damaged(
            f"{path}: not a page's notes, or damaged ({reason}); {_ADVICE}", path
        ) from error


def notes_given(notes: str | Path | Notes | None) -> dict[str, Any]:
    """Notes from a path or as `read_notes` gives them; without any, empty ones."""
    if isinstance(notes, str | Path):
        return read_notes(notes)
    return checked_notes({"version": VERSION} if notes is None else notes)


def checked_notes(notes: Any) -> dict[str, Any]:
    """A copy with nothing in it but notes. Raises ValueError."""
    found = _mapping(notes, "notes", _NOTES)
    if found.get("version") != VERSION:
        raise ValueError(f"notes: version {found.get('version')!r}, expected {VERSION}; {_ADVICE}")
    vectors = _mapping(found.get("vectors", {}), "notes['vectors']", _VECTOR)
    behaviours = _list(found.get("behaviours", []), "notes['behaviours']")
    return {
        "version": VERSION,
        "vectors": {key: _entry(entry, f"vector {key}", _ENTRY) for key, entry in vectors.items()},
        "behaviours": [_behaviour(entry, f"behaviour {i}") for i, entry in enumerate(behaviours)],
    }


def _behaviour(entry: Any, where: str) -> dict[str, Any]:
    made = _entry(entry, where, _BEHAVIOUR)
    made["members"] = _members(entry.get("members"), where)
    made["merged"] = [_members(some, where) for some in _list(entry.get("merged", []), where)]
    return made


def _entry(entry: Any, where: str, keys: re.Pattern[str]) -> dict[str, Any]:
    found = _mapping(entry, f"notes of {where}", keys)
    star = found.get("star", False)
    if not isinstance(star, bool):
        raise ValueError(f"notes of {where}: star={star!r}, expected true or false; {_ADVICE}")
    made: dict[str, Any] = {"star": star}
    for name, longest in _LONGEST.items():
        text = found.get(name, "")
        if not isinstance(text, str) or len(text) > longest:
            allowed = f"a text of at most {longest:,} characters"
            raise ValueError(f"notes of {where}: {name} is not {allowed}; {_ADVICE}")
        # What is made visible takes more characters.
        made[name] = printable(text)[:longest]
    return made


def _mapping(value: Any, where: str, keys: re.Pattern[str]) -> dict[str, Any]:
    if not isinstance(value, Mapping) or len(value) > _MOST:
        raise ValueError(f"{where}: not a mapping of at most {_MOST:,} entries; {_ADVICE}")
    if unknown := [str(k)[:40] for k in value if not (isinstance(k, str) and keys.fullmatch(k))]:
        raise ValueError(f"{where}: unknown entries {unknown[:5]}; {_ADVICE}")
    return dict(value)


def _list(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list) or len(value) > _MOST:
        raise ValueError(f"{where}: not a list of at most {_MOST:,} entries; {_ADVICE}")
    return value


def _members(value: Any, where: str) -> list[str]:
    members = _list(value, f"notes of {where}: members")
    if not all(isinstance(key, str) and _ROW.fullmatch(key) for key in members):
        raise ValueError(f"notes of {where}: members are not vectors' numbers; {_ADVICE}")
    return members
