"""Judges: anything that maps a text, a question, to a text, its answer.

A function of yours is a judge. `local` makes one of a model, `openai_compatible` of a server, and
`sheet` of a person with a spreadsheet. What a judge answers is checked, never trusted.
"""

from tl_melbo.judges._asking import ask
from tl_melbo.judges._local import local
from tl_melbo.judges._server import openai_compatible
from tl_melbo.judges._sheet import Sheet, sheet

__all__ = ["Sheet", "ask", "local", "openai_compatible", "sheet"]
