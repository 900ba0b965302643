"""Text from a model or a file, shown so that it cannot steer what shows it."""

import difflib
from collections.abc import Iterable

_BIDIRECTIONAL = [0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A)]
_VISIBLE = str.maketrans(
    {code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\t\n"}
    | {code: f"\\x{code:02x}" for code in range(0x7F, 0xA0)}
    # These reorder the text around them, the page's own included.
    | {code: f"[U+{code:04X}]" for code in [0x2028, 0x2029, *_BIDIRECTIONAL]}
    # Half a character: UTF-8 cannot hold it.
    | dict.fromkeys(range(0xD800, 0xE000), "\ufffd")
)
_MOST_QUOTED = 60
# Spreadsheets take the wide forms for the same.
_FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠")


def printable(text: str) -> str:
    """Make all control characters but newlines and tabs visible, and broken characters, too."""
    return text.replace("\r\n", "\n").translate(_VISIBLE)


def quoted(text: str) -> str:
    """A text in quotes on one line, short enough for a message."""
    return repr(text if len(text) <= _MOST_QUOTED else text[: _MOST_QUOTED - 1] + "…")


def defused(text: str) -> str:
    """Keep a spreadsheet from running text as a formula (OWASP, "CSV injection")."""
    return f"'{text}" if text.lstrip("'").startswith(_FORMULA_STARTS) else text


def undefused(text: str) -> str:
    """The text that `defused` was given."""
    is_defused = text.startswith("'") and text.lstrip("'").startswith(_FORMULA_STARTS)
    return text[1:] if is_defused else text


def did_you_mean(word: str, allowed: Iterable[str]) -> str:
    """For a message about an unknown word: the nearest that is known, if any is near."""
    near = difflib.get_close_matches(word, list(allowed), 1)
    return f"did you mean {near[0]!r}?" if near else ""
