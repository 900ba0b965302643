"""How high do searches from the same random starts climb, for how many gradients and seconds?

    python -m benchmarks.climbing [--draw]

writes benchmarks/climbing.csv and docs/pictures/climbing.png. Twelve vectors, each by itself: this
package's ascent and the published AdamW from the same starts, and as a control the best of as many
random vectors. Gradients do not depend on the machine. Seconds are gradients times those that
`benchmarks.compare` measured, on the machine of RESULTS.md, with one vector after another for both.
"""

import sys
from pathlib import Path
from typing import Any

import pandas as pd
import torch

import tl_melbo as tm
from benchmarks.cases import LAST_THREE, PROMPTS
from benchmarks.tables import markdown, measured

KEPT = Path(__file__).with_suffix(".csv")
PICTURE = Path(__file__).parents[1] / "docs" / "pictures" / "climbing.png"
OURS, PUBLISHED, RANDOM = "ascent", "published AdamW", "best of random vectors"
N_STARTS, RADIUS, LONGEST = 12, 12.0, {OURS: 40, PUBLISHED: 300, RANDOM: 300}
GRADIENTS = (1, 2, 3, 4, 5, 7, 10, 15, 20, 30, 40, 60, 100, 150, 200, 300)
SHOWN = (1, 2, 3, 5, 10, 40, 300)


def measure() -> pd.DataFrame:
    """The highest objective of each start after so many gradients; the first is the start's own."""
    f = tm.ActivationMap.from_prompts(tm.load_model(), PROMPTS[0], chat=True)
    drawn = tm.random_vectors(f, N_STARTS * LONGEST[RANDOM], RADIUS, seed=1).vectors
    with torch.no_grad():
        sizes = [f.delta(some, LAST_THREE).flatten(1).norm(dim=-1) for some in drawn.split(100)]
    climbs = {RANDOM: torch.cat(sizes).view(N_STARTS, -1)}
    for name, optimiser in ((OURS, "ascent"), (PUBLISHED, "adamw")):
        options: dict[str, Any] = {"optimiser": optimiser, "steps": LONGEST[name]}
        found = tm.melbo(f, N_STARTS, RADIUS, orthogonal=False, **options)
        assert found.history is not None
        climbs[name] = found.history.nan_to_num(0.0)
    rows = [
        (name, start, gradients, round(float(row[gradients - 1]), 2))
        for name in LONGEST
        for start, row in enumerate(climbs[name].cummax(1).values)
        for gradients in GRADIENTS
        if gradients <= len(row)
    ]
    return pd.DataFrame(rows, columns=["search", "start", "gradients", "objective"])


def seconds_a_gradient() -> dict[str, float]:
    library = measured("a library of 32 orthogonal vectors, 10 gradients each, seconds") / 320
    return {
        OURS: library,
        PUBLISHED: measured("original code, seconds a vector (from 1 and 9 steps)") / 300,
    }


def table() -> str:
    """Medians, lowest and highest over the starts."""
    rows, each = pd.read_csv(KEPT), seconds_a_gradient()

    def cell(name: str, gradients: int) -> str:
        own = rows[(rows["search"] == name) & (rows["gradients"] == gradients)]["objective"]
        if own.empty:
            return "–"
        taken = f"; {gradients * each[name]:.2g} s" if name in each else ""
        return f"{own.median():.0f} ({own.min():.0f} to {own.max():.0f}){taken}"

    lines = [{"gradients": n, **{name: cell(name, n) for name in LONGEST}} for n in SHOWN]
    return markdown(pd.DataFrame(lines))


def picture(rows: pd.DataFrame) -> Any:
    """Left against gradients, right against seconds; a line for each start."""
    import plotly.express as px

    each = seconds_a_gradient()
    timed = rows[rows["search"].isin(each)]
    seconds = timed["gradients"] * timed["search"].map(each)
    both = pd.concat([
        rows.assign(against="gradients a vector", x=rows["gradients"]),
        timed.assign(against="seconds a vector", x=seconds),
    ])  # fmt: skip
    figure = px.line(
        both, x="x", y="objective", color="search", line_group="start", facet_col="against",
        log_x=True, log_y=True, markers=True, template="plotly_white", width=1000, height=420,
        labels={"x": "", "search": ""}, color_discrete_sequence=["#0072b2", "#d55e00", "#57606a"],
    )  # fmt: skip
    figure.update_traces(opacity=0.5, marker_size=4).update_xaxes(matches=None)
    figure.for_each_annotation(lambda note: note.update(text=note.text.removeprefix("against=")))
    return figure.update_layout(legend={"orientation": "h", "y": -0.15})


def main() -> None:
    if "--draw" not in sys.argv:
        measure().to_csv(KEPT, index=False)
    picture(pd.read_csv(KEPT)).write_image(PICTURE, scale=2)
    print(table())


if __name__ == "__main__":
    main()
