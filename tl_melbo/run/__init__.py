"""The folder of a run: all that a search found and all that was made of it."""

from tl_melbo.run._folder import REFERENCE, VECTORS, check_reference, family_folder
from tl_melbo.run._run import Run
from tl_melbo.run._settings import absolute

__all__ = ["REFERENCE", "VECTORS", "Run", "absolute", "check_reference", "family_folder"]
