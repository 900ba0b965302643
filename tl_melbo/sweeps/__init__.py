"""Many searches at once: a grid to run folders, one table and one page."""

from tl_melbo.sweeps._sweep import sweep

__all__ = ["sweep"]
