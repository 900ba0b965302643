"""Checks of the exercises in the notebooks: one module a notebook.

    from tl_melbo.course import from_scratch as check

A check is given a student's answer. It gives a `Note` on what a right answer means, or on an
answer that is still `...`; it raises `Wrong`, which says what is wrong, not what would be right.
"""

from tl_melbo.course._lines import lines
from tl_melbo.course._note import Note, Wrong, unfinished

__all__ = ["Note", "Wrong", "lines", "unfinished"]
