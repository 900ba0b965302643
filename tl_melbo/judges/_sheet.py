"""A person as a judge: questions in a spreadsheet, answers read back from it."""

import csv
import hashlib
import io
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from tl_melbo.errors import Damaged, Unanswered, told
from tl_melbo.files import replacing
from tl_melbo.judges._asking import MOST_CHARACTERS
from tl_melbo.shapes import shape_checked
from tl_melbo.text import defused, printable, undefused

_COLUMNS = ["number", "id", "question", "answer"]
# What one cell of a spreadsheet holds.
_LONGEST_CELL = 32_767
_MOST_BYTES = 2**28


@shape_checked
def sheet(path: str | Path) -> "Sheet":
    """A judge that writes its questions into a CSV file for a person, and reads the answers back.

    The first pass writes the questions and raises `errors.Unanswered`. Fill in the column answer,
    save the file as CSV, and run the same lines again: the second pass reads the answers. Keep the
    columns number and id as they are.

    Raises:
        Unanswered: when asked, while there are open questions: `.path`, `.rows`.
        Damaged: when asked, if the file is not such a sheet any more.
    """
    return Sheet(Path(path).expanduser())


class Sheet:
    """What `sheet` gives: from a text to a text."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __call__(self, text: str) -> str:
        """The answer that stands in the file."""
        return self.answers([text])[0]

    def answers(self, texts: Sequence[str]) -> list[str]:
        """The answers to questions; those that the file does not have yet are added to it."""
        known = self._read() if self.path.exists() else pd.DataFrame(columns=_COLUMNS, dtype=str)
        there = {*known["id"]}
        new = {name: text for text in texts if (name := _name(text)) not in there}
        if new:
            rows = [
                (str(number), name, defused(_fitting(text)), "")
                for number, (name, text) in enumerate(new.items(), start=len(known) + 1)
            ]
            known = pd.concat([known, pd.DataFrame(rows, columns=_COLUMNS)]).fillna("")
            with replacing(self.path) as temporary:
                # With its mark, Excel takes the file for UTF-8.
                known.to_csv(temporary, index=False, encoding="utf-8-sig")
        asked = {_name(text) for text in texts}
        given = [undefused(cell.strip())[:MOST_CHARACTERS].strip() for cell in known["answer"]]
        answers = dict(zip(known["id"], given, strict=True))
        is_open = [name in asked and not answers[name] for name in known["id"]]
        if any(is_open):
            numbers = known["number"][is_open].tolist()
            raise Unanswered(
                f"{self.path}: {len(numbers)} of {len(asked)} questions have no answer yet, "
                f"numbers {told(numbers)}; fill in the column 'answer', save the file as CSV, and "
                "run this again",
                self.path,
                [int(number) if number.isdecimal() else 0 for number in numbers],
            )
        return [answers[_name(text)] for text in texts]

    def _read(self) -> pd.DataFrame:
        """The file, whichever spreadsheet saved it."""
        advice = "restore it, or name another file"
        if self.path.stat().st_size > _MOST_BYTES:
            raise Damaged(f"{self.path}: larger than a sheet can be; {advice}", self.path)
        try:
            text = self.path.read_bytes().decode("utf-8-sig")
        except UnicodeDecodeError:
            how = "save it as 'CSV UTF-8 (comma delimited)'"
            raise Damaged(f"{self.path}: not in UTF-8; {how}", self.path) from None
        # Where a comma is decimal, spreadsheets separate by semicolons.
        first = text.partition("\n")[0]
        separator = max(",;\t", key=first.count)
        try:
            table = pd.read_csv(
                io.StringIO(text, newline=""), sep=separator, dtype=str, keep_default_na=False
            )
        except (ValueError, csv.Error) as error:
            raise Damaged(f"{self.path}: not a table ({error}); {advice}", self.path) from None
        if missing := [name for name in _COLUMNS if name not in table]:
            raise Damaged(f"{self.path}: lacks the columns {missing}; {advice}", self.path)
        if twice := table["number"][table["id"].duplicated()].tolist():
            what = f"questions {told(twice)} are there twice"
            raise Damaged(f"{self.path}: {what}; leave one of each", self.path)
        return table

    def __repr__(self) -> str:
        return f"judges.sheet({str(self.path)!r})"


def _name(text: str) -> str:
    """By which a question is found again: spreadsheets change line ends and spaces."""
    return "q" + hashlib.sha256(text.encode(errors="replace")).hexdigest()[:16]


def _fitting(text: str) -> str:
    shown = printable(text)
    if len(shown) >= _LONGEST_CELL:
        most = f"a cell of a spreadsheet holds at most {_LONGEST_CELL:,}"
        raise ValueError(f"a question of {len(shown):,} characters: {most}; take shorter texts")
    return shown
