"""Prompts that make a model less of an assistant: situations, each with openings to go on from."""

from functools import cache
from importlib.resources import files

from tl_melbo.tables import Table

# The last so many openings of each situation are held out.
_N_HELD_OUT = 4


@cache
def _read() -> list[tuple[str, str, str]]:
    """Of each prompt: its situation, its split, and the text."""
    text = files("tl_melbo.adapters").joinpath("situations.txt").read_text(encoding="utf-8")
    rows = []
    for block in text.strip().split("\n\n"):
        header, *openings = block.splitlines()
        name, _, frame = header.removeprefix("# ").partition(": ")
        for place, opening in enumerate(openings, 1):
            split = "held_out" if place > len(openings) - _N_HELD_OUT else "train"
            rows.append((name, split, f"{frame}\n\n{opening}"))
    return rows


def situations() -> Table:
    """The prompts that come with the package: 24 situations, 16 for training and 4 held out each.

    Returns:
        A frame with the columns situation, split ("train" or "held_out") and prompt.
    """
    return Table(_read(), columns=["situation", "split", "prompt"])


def prompts_of(wanted: str) -> list[str]:
    """The prompts of a split, "train" or "held_out"."""
    return [prompt for _, split, prompt in _read() if split == wanted]
