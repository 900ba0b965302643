"""A library as one self-contained HTML page, to look at the completions hard. It works offline."""

from tl_melbo.analysis._completions import COMPLETION_COLUMNS, collect_completions
from tl_melbo.analysis._family import Family, collect_family
from tl_melbo.report._page import write
from tl_melbo.report._render import measure_shown, not_converged

__all__ = [
    "COMPLETION_COLUMNS",
    "Family",
    "collect_completions",
    "collect_family",
    "measure_shown",
    "not_converged",
    "write",
]
