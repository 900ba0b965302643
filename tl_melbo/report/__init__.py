"""A library as one self-contained HTML page, to look at the completions hard. It works offline."""

from tl_melbo.analysis._completions import collect_completions
from tl_melbo.analysis._family import Family, collect_family
from tl_melbo.report._page import write

__all__ = ["Family", "collect_completions", "collect_family", "write"]
