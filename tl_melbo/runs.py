"""The old path of `tl_melbo.run`, kept for a release."""

from pathlib import Path
from typing import Any

from tl_melbo.run import Run
from tl_melbo.run._files import *  # noqa: F403


def load_families(folder: Path, _found: Any = None) -> list[Any]:
    """The families of a folder; now `Run.families`."""
    return Run(folder).families()
