"""What README and documentation quote of measurements, made from the files that hold them.

    python -m benchmarks.quoted

Each place is between two comments, `<!-- name -->` and `<!-- name: end -->`. A test compares.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pandas as pd

from benchmarks import climbing, scale
from benchmarks.tables import measured

HERE = Path(__file__).parent
ROOT = HERE.parent
_SHOWN = 76


def gallery() -> str:
    """By vector: its greedy text, and how often samples have what is counted."""
    told = json.loads((HERE / "gallery.json").read_text(encoding="utf-8"))
    lines = [
        "| vector | greedy text | behaviour | under the vector | unsteered | random vectors |",
        "|---|---|---|---|---|---|",
    ]
    for row in told["rows"]:
        rates = [_rate(row["rates"][kind]) for kind in ("vector", "unsteered", "random")]
        cells = [row["vector"], f"“{_cut(row['greedy'])}”", row["name"], *rates]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def output() -> str:
    """What the README's first lines of code print, to the letter."""
    told = json.loads((HERE / "gallery.json").read_text(encoding="utf-8"))
    numbered = enumerate([told["baseline"], *told["first"]], -1)
    return "\n".join(["```text", *(f"{i:2}  {text[:64]!r}" for i, text in numbered), "```"])


def parting() -> str:
    """How MELBO's first vector leaves the Jacobian's first direction as the radius grows."""
    table = pd.read_csv(HERE / "parting.csv")
    names = ("share of the tokens' norm", "R", "cosine with J's first", "effect / its linear part")
    lines = ["| " + " | ".join(names) + " |", "|---|---|---|---|"]
    for row in table.to_dict("records"):
        share = f"{row['share']:g}" + (" (`auto`)" if row["share"] >= round(row["auto"], 2) else "")
        numbers = [f"{row['radius']:.2g}", f"{row['melbo cosine']:.2f}", f"{row['melbo gain']:.2f}"]
        lines.append("| " + " | ".join([share, *numbers]) + " |")
    return "\n".join(lines)


def comparison() -> str:
    """Other tools, with the seconds of `python -m benchmarks.compare`."""
    library = measured("a library of 32 orthogonal vectors, 10 gradients each, seconds") / 32
    ours = measured("all positions: ours, seconds a vector")
    published = measured("original code, seconds a vector (from 1 and 9 steps)")
    batched = measured("batched-melbo, seconds a vector (batch of 8, from 1 and 4 steps)")
    ortho = measured("ours, seconds there (without the Jacobian)")
    jacobian = measured("the Jacobian, seconds once a family")
    adam = measured("published, seconds (from 1 and 6 steps)")
    rows = [
        ("", "finds without labels", "computes", "seconds a vector, measured here"),
        ("---",) * 4,
        ("`tl_melbo`, MELBO", "yes", "the objective of MELBO, by power iteration",
         f"{ours:.2f} in a batch, {library:.1f} one after another"),
        ("code of MELBO (2024); `batched-melbo`", "yes",
         "the same, by 300 to 1200 AdamW steps", f"{published:.0f}; {batched:.0f}"),
        ("`tl_melbo`, MELBO-ortho", "from one vector", "its effect again, orthogonal; by L-BFGS",
         f"{ortho:.1f}, and {jacobian:.1f} once a family"),
        ("code of MELBO-ortho (2024)", "from one vector", "the same, by 1000 Adam steps",
         f"{adam:.0f}"),
        ("`repeng`, `steering-vectors` (CAA)", "no: pairs of texts",
         "their difference: the direction you asked for", "–"),
        ("SAELens, Neuronpedia", "yes, with a trained SAE", "directions that the model uses", "–"),
    ]  # fmt: skip
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


QUOTED: dict[tuple[str, str], Callable[[], str]] = {
    ("README.md", "gallery"): gallery,
    ("README.md", "output"): output,
    ("README.md", "comparison"): comparison,
    ("docs/theory.md", "parting"): parting,
    ("docs/how-to-choose.md", "climbing"): climbing.table,
    ("docs/scale.md", "check"): scale.check,
    ("docs/scale.md", "scale"): scale.table,
}


def with_quotes(text: str, name: str, quote: str) -> str:
    """The text with that place filled anew."""
    place = re.compile(rf"(<!-- {name} -->\n).*?(<!-- {name}: end -->)", re.DOTALL)
    filled, count = place.subn(lambda found: f"{found[1]}{quote}\n{found[2]}", text)
    if count != 1:
        raise ValueError(f"{name}: {count} places for it; one is wanted")
    return filled


def _cut(text: str) -> str:
    text = " ".join(text.split()).replace("|", "\\|")
    return text if len(text) <= _SHOWN else text[:_SHOWN].rsplit(" ", 1)[0] + " …"


def _rate(told: list[float]) -> str:
    hits, n, low, high = told
    return f"{hits} of {n} ({low:.0%} to {high:.0%})"


def main() -> None:
    for (file, name), quote in QUOTED.items():
        path = ROOT / file
        text = with_quotes(path.read_text(encoding="utf-8"), name, quote())
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
