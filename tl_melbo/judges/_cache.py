"""Answers by the content of their question: one file each, written whole or not at all."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tl_melbo.errors import warn_user
from tl_melbo.files import replacing, writable_folder

# Part of an entry's name: raise it when what is in an entry changes.
_FORMAT = 1
_MOST_BYTES = 2**20


class Cache:
    """A folder of answers. Nothing of the questions is in it but their hash."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = writable_folder(folder)

    def _path(self, asked: Mapping[str, Any]) -> Path:
        content = json.dumps([_FORMAT, asked], sort_keys=True)
        return self.folder / f"{hashlib.sha256(content.encode()).hexdigest()}.json"

    def get(self, asked: Mapping[str, Any]) -> str | None:
        """The answer to what was asked; None, and a warning, where it is damaged."""
        path = self._path(asked)
        if not path.exists():
            return None
        try:
            if path.stat().st_size > _MOST_BYTES:
                raise ValueError("too large")
            entry = json.loads(path.read_text(encoding="utf-8"))
            answer = entry["answer"]
            if not isinstance(answer, str) or _digest(answer) != entry["sha256"]:
                raise ValueError("not what was written")
        except (OSError, ValueError, TypeError, KeyError, RecursionError):
            warn_user(f"{path}: damaged; the question is asked again")
            return None
        return answer

    def put(self, asked: Mapping[str, Any], answer: str) -> None:
        """Keep an answer; it is on disk when this returns."""
        entry = {"answer": answer, "sha256": _digest(answer), "model": asked["model"]}
        with replacing(self._path(asked)) as temporary:
            temporary.write_text(json.dumps(entry), encoding="utf-8")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
