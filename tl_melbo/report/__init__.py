"""A library as one self-contained HTML page, to look at the completions hard. It works offline."""

from tl_melbo.analysis._completions import COMPLETION_COLUMNS, collect_completions
from tl_melbo.analysis._family import Family, collect_family
from tl_melbo.report._facts import measure_shown, not_converged
from tl_melbo.report._notes import read_notes
from tl_melbo.report._page import write

__all__ = [
    "COMPLETION_COLUMNS",
    "Family",
    "collect_completions",
    "collect_family",
    "measure_shown",
    "not_converged",
    "read_notes",
    "write",
]
