"""One dot a vector: is it used, and is it specific?"""

import math

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from tl_melbo.plots._style import (
    DOTTED,
    GREY,
    OTHERS,
    SEQUENTIAL,
    SMALLEST_KL,
    axis,
    check_frame,
    layout,
)
from tl_melbo.shapes import shape_checked


@shape_checked
def presence_points(
    scanned: pd.DataFrame, q: float = 0.05, title: str = "Presence in the unsteered model"
) -> go.Figure:
    """Draw the AUROC of every vector, those beyond the random-direction null apart.

    Args:
        scanned: as `analysis.presence` gives it.
        q: adjusted p-values below this count as found.
        title: above the figure; "" for none.

    Raises:
        ValueError: a column is missing, or there are no rows.
    """
    columns = ("index", "mean_projection", "mean_projection_control", "auroc", "p_value")
    check_frame(scanned, "scanned", (*columns, "p_adjusted"))
    figure = go.Figure()
    found = scanned["p_adjusted"] < q
    groups = ((~found, "like random directions", "#8c959f", "circle-open"),
              (found, f"adjusted p < {q:g}", OTHERS[0], "diamond"))  # fmt: skip
    for chosen, name, colour, symbol in groups:
        rows = scanned[chosen]
        figure.add_scatter(
            x=rows["index"],
            y=rows["auroc"],
            name=f"{name} ({len(rows)})",
            mode="markers",
            marker={"size": 8, "color": colour, "symbol": symbol},
            customdata=rows.drop(columns=["index", "auroc"]).to_numpy(),
            hovertemplate="vector %{x}<br>AUROC %{y:.3f}<br>mean projection "
            "%{customdata[0]:.3g}, in control %{customdata[1]:.3g}<br>p %{customdata[2]:.3g}, "
            "adjusted %{customdata[3]:.3g}<extra></extra>",
        )
    figure.add_hline(0.5, line=DOTTED)
    across = axis("vector", tickformat=",d")
    up = axis("AUROC, texts against control", range=[-0.03, 1.03])
    return figure.update_layout(layout(title, xaxis=across, yaxis=up, showlegend=True))


@shape_checked
def specificity_points(
    measured: pd.DataFrame, title: str = "Effect on the prompt and elsewhere"
) -> go.Figure:
    """Draw what every vector does on its prompt against what it does elsewhere.

    On the dotted diagonal a vector acts alike on both: specificity 0.5. The darker a dot, the more
    the vector costs on ordinary prose.

    Args:
        measured: as `evaluation.side_effects` gives it.
        title: above the figure; "" for none.

    Raises:
        ValueError: a column is missing, or there are no rows.
    """
    columns = ("vector", "kl_target", "kl_unrelated", "specificity", "loss_increase")
    check_frame(measured, "measured", columns)
    # A row that was not finite has no place.
    measured = pd.DataFrame(measured[measured["specificity"].notna()])
    check_frame(measured, "measured", columns)
    elsewhere = measured["kl_unrelated"].clip(lower=SMALLEST_KL).tolist()
    target = measured["kl_target"].clip(lower=SMALLEST_KL).tolist()
    dots = go.Scatter(
        x=elsewhere,
        y=target,
        mode="markers+text",
        text=measured["vector"],
        textposition="top center",
        textfont={"size": 9, "color": GREY},
        marker=_by_loss(measured["loss_increase"].to_numpy()),
        customdata=measured[["vector", "specificity", "loss_increase"]].to_numpy(),
        hovertemplate="vector %{customdata[0]}<br>KL on the prompt %{y:.3g}, elsewhere "
        "%{x:.3g}<br>specificity %{customdata[1]:.2f}<br>loss increase %{customdata[2]:.3g}"
        "<extra></extra>",
    )
    ends = [0.6 * min(*elsewhere, *target), 1.7 * max(*elsewhere, *target)]
    ticks = _round_numbers(*ends)
    logarithmic = {
        "type": "log",
        "tickvals": ticks,
        "ticktext": [f"{tick:g}" for tick in ticks],
        "range": [math.log10(end) for end in ends],
    }
    across = axis("mean KL on unrelated prompts (nats)", **logarithmic)
    up = axis("KL on the prompt (nats)", **logarithmic)
    figure = go.Figure(dots, layout(title, width=620, xaxis=across, yaxis=up))
    diagonal = {"x0": ends[0], "y0": ends[0], "x1": ends[1], "y1": ends[1]}
    figure.add_shape(type="line", **diagonal, line=DOTTED | {"color": GREY}, layer="below")
    corners = (("more on the prompt", 0.02, "left"), ("more elsewhere", 0.98, "right"))
    for text, place, side in corners:
        figure.add_annotation(
            text=text, x=place, y=1 - place, xref="paper", yref="paper", xanchor=side,
            showarrow=False, font={"color": GREY},
        )  # fmt: skip
    return figure


def _by_loss(losses: np.ndarray) -> dict[str, object]:
    """Dots, the darker the more a vector costs."""
    return {
        "size": 10,
        "color": losses,
        "colorscale": SEQUENTIAL,
        "reversescale": True,
        # A tenth of a nat at least: without it, noise would get every colour.
        "cmin": min(0.0, losses.min()),
        "cmax": max(0.1, losses.max()),
        "line": {"width": 1, "color": GREY},
        "colorbar": {"title": {"text": "loss increase<br>(nats a token)"}, "thickness": 10},
    }


def _round_numbers(low: float, high: float) -> list[float]:
    """1, 2 and 5 times the powers of ten in a range; only the powers where those are many."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = (1, 2, 5) if len(decades) <= 4 else (1,)
    numbers = [float(f"{step}e{decade}") for decade in decades for step in steps]
    return [number for number in numbers if low <= number <= high]
