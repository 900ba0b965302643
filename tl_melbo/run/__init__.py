"""The folder of a run: all that a search found and all that was made of it."""

from tl_melbo.run._files import REFERENCE, VECTORS, absolute, family_folder
from tl_melbo.run._run import Run

__all__ = ["REFERENCE", "VECTORS", "Run", "absolute", "family_folder"]
