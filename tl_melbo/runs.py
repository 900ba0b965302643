"""The old path of `tl_melbo.run`, kept for a release."""

from tl_melbo.run import REFERENCE, VECTORS, family_folder
from tl_melbo.run._contents import COMPOSITION, SIDE_EFFECTS, TABLE, load_families
from tl_melbo.run._folder import COMPLETIONS, REPORT
from tl_melbo.run._settings import SETTINGS, digest, load_settings
from tl_melbo.run._tables import load_table, save_table

__all__ = [
    "COMPLETIONS", "COMPOSITION", "REFERENCE", "REPORT", "SETTINGS", "SIDE_EFFECTS", "TABLE",
    "VECTORS", "digest", "family_folder", "load_families", "load_settings", "load_table",
    "save_table",
]  # fmt: skip
