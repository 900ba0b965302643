"""What a folder says of itself beside its vectors: the model's name, whose texts it holds."""

import hashlib
import json
from pathlib import Path
from typing import Any

from tl_melbo.errors import Damaged
from tl_melbo.files import replacing
from tl_melbo.vectors import SteeringVectors

SETTINGS = "settings.json"
_MOST_BYTES = 2**20


def save_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Write the settings of a folder."""
    with replacing(folder / SETTINGS) as temporary:
        text = json.dumps(settings, indent=2, ensure_ascii=False)
        temporary.write_text(text + "\n", encoding="utf-8", errors="backslashreplace")


def load_settings(folder: Path) -> dict[str, Any]:
    """Read the settings of a folder; empty where there are none.

    Raises:
        Damaged: the file cannot be read.
    """
    path = folder / SETTINGS
    if not path.is_file():
        return {}
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise ValueError("too large")
        settings = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(settings, dict):
            raise ValueError("not an object")
    except (ValueError, RecursionError) as error:
        raise Damaged(
            f"{path}: damaged ({error}); delete it, and name the model with --model, unless it is "
            "the bundled one",
            path,
        ) from error
    return settings


def digest(vectors: SteeringVectors) -> str:
    """What tells one library's numbers from another's."""
    return hashlib.sha256(vectors.vectors.contiguous().numpy().tobytes()).hexdigest()


def absolute(model: str | None) -> str | None:
    """A model's name, so that it still means the same from another folder."""
    if model is not None and Path(model).expanduser().exists():
        return str(Path(model).expanduser().resolve())
    return model
