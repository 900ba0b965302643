"""Where do the methods part? The first vector of each against the Jacobian's, radius by radius.

    python -m benchmarks.parting [--prompts 3] [--draw]

writes benchmarks/parting.csv, a row as it is measured, and docs/pictures/parting.png. At a small
radius all must find the Jacobian's first direction. One target position, so that the effect that
MELBO measures and the mean effect that transcoding models are the same.
"""

import argparse
import math
from pathlib import Path
from typing import Any

import pandas as pd
import torch

import tl_melbo as tm
from benchmarks.cases import PROMPTS

KEPT = Path(__file__).with_suffix(".csv")
PICTURE = Path(__file__).parents[1] / "docs" / "pictures" / "parting.png"
LAST = slice(-1, None)
# Shares of the median token norm at the source; `auto` lies at about 0.11.
SHARES = (0.001, 0.01, 0.03, 0.06, 0.11, 0.2)
# From the Jacobian's directions: from a random start, 40 steps do not tell close ones apart.
N_FACTORS, STEPS, CLIMB = 4, 10, 40
# Okabe and Ito's colours, which are apart for all common kinds of colour blindness.
COLOURS = {"melbo": "#0072b2", "dct": "#d55e00", "jacobian": "#57606a"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--draw", action="store_true", help="only draw what is there")
    parser.add_argument("--prompts", default=3, type=int, metavar="N", help="the first N of 3 (3)")
    chosen = parser.parse_args()
    if not chosen.draw:
        model = tm.load_model()
        for prompt in PROMPTS[: chosen.prompts]:
            measure(model, prompt)
    picture(pd.read_csv(KEPT)).write_image(PICTURE, scale=2)


def measure(model: Any, prompt: str) -> None:
    kept = pd.read_csv(KEPT) if KEPT.is_file() else pd.DataFrame(columns=["prompt", "share"])
    done = set(kept[kept["prompt"] == prompt]["share"])
    if {*SHARES} <= done:
        return
    f = tm.ActivationMap.from_prompts(model, prompt, chat=True)
    length = float(f.x[0, 1:].norm(dim=-1).median())
    auto = tm.calibrate_radius(f, positions=LAST)
    known = tm.jacobian(f, 1, 1.0, positions=LAST)
    first, value = known.vectors[0], float(known.columns["singular_value"][0])
    for share in (share for share in SHARES if share not in done):
        radius = share * length
        climbed = tm.melbo(f, 1, radius, positions=LAST, steps=CLIMB)
        factors = tm.dct(f, N_FACTORS, radius=radius, positions=LAST, steps=STEPS, start="jacobian")
        row = {"prompt": prompt, "share": share, "radius": radius, "auto": auto / length}
        for name, found in (("melbo", climbed), ("dct", factors), ("jacobian", known * radius)):
            with torch.no_grad():
                effect = float(f.delta(found.vectors[:1], positions=LAST).norm())
            cosines = tm.analysis.cosine_similarity(found.vectors, first[None])[:, 0].abs()
            row |= {f"{name} cosine": round(float(cosines[0]), 5)}
            row |= {f"{name} gain": effect / radius / value}
            if name == "dct":
                row["dct nearest"] = round(float(cosines.max()), 5)
        pd.DataFrame([row]).to_csv(KEPT, mode="a", header=not KEPT.is_file(), index=False)
        print(row, flush=True)


def picture(rows: pd.DataFrame) -> Any:
    """Left: the cosine with the Jacobian's first. Right: the effect, over what is linear."""
    from plotly.subplots import make_subplots

    titles = ("cosine with the Jacobian's first vector", "effect / effect to first order")
    nearest = rows.groupby("share")["dct nearest"].median()
    figure = make_subplots(rows=1, cols=2, subplot_titles=titles, horizontal_spacing=0.1)
    names = {"melbo": "MELBO", "dct": "exponential DCT, most important", "jacobian": "Jacobian"}
    middle = rows.groupby("share").median(numeric_only=True)
    for name, color in COLOURS.items():
        for column, what in enumerate(("cosine", "gain"), start=1):
            marks = {"mode": "markers", "marker": {"color": color, "opacity": 0.4}}
            line = {"mode": "lines", "line": {"color": color}, "name": names[name]}
            some = f"{name} {what}"
            figure.add_scatter(x=rows["share"], y=rows[some], showlegend=False, **marks,
                               row=1, col=column)  # fmt: skip
            figure.add_scatter(x=middle.index, y=middle[some], showlegend=column == 1, **line,
                               row=1, col=column)  # fmt: skip
    figure.add_scatter(x=nearest.index, y=nearest, mode="lines", row=1, col=1,
                       line={"color": COLOURS["dct"], "dash": "dot"},
                       name=f"exponential DCT, nearest of {N_FACTORS} factors")  # fmt: skip
    auto = float(rows["auto"].median())
    figure.add_vline(x=auto, line_dash="dot")
    # On a logarithmic axis an annotation's place is the logarithm.
    for axis in ("x", "x2"):
        figure.add_annotation(text="auto", x=math.log10(auto), y=1, xref=axis, yref="paper",
                              showarrow=False, xanchor="left", yanchor="top")  # fmt: skip
    figure.update_xaxes(type="log", range=[-3.1, -0.6], title_text="radius / median token norm")
    figure.update_layout(width=1000, height=400, margin={"t": 60}, template="plotly_white",
                         legend={"orientation": "h", "y": -0.25})  # fmt: skip
    return figure


if __name__ == "__main__":
    main()
