"""One coloured cell a pair: vectors against vectors, prompts against vectors."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from torch import Tensor

from tl_melbo.plots._style import (
    DIVERGING,
    HOVER,
    SEQUENTIAL,
    axis,
    check_frame,
    colour_bar,
    layout,
    whole_numbers,
    wrapped,
)
from tl_melbo.shapes import Float, shape_checked


@shape_checked
def cosine_heatmap(
    similarity: Float[Tensor, "row column"],
    title: str = "Cosine similarity",
    *,
    labels: Sequence[int | str] | None = None,
) -> go.Figure:
    """Draw a matrix of cosines: red for same direction, white for orthogonal, blue for opposite.

    Args:
        similarity: as `analysis.cosine_similarity` gives it, from -1 to 1.
        title: above the figure; "" for none.
        labels: what to call the vectors by, where they are not 0, 1, 2, ...; rows and columns
            must then be the same vectors.

    Raises:
        ValueError: values outside -1 to 1 or not finite, or as many labels as there are not rows.
    """
    z = similarity.detach().cpu().float().numpy()
    if not (np.abs(z) <= 1 + 1e-6).all():
        raise ValueError(
            "similarity: holds values outside -1 to 1, or not finite; pass what "
            "analysis.cosine_similarity returns"
        )
    names = None if labels is None else [str(label) for label in labels]
    if names is not None and z.shape != (len(names), len(names)):
        raise ValueError(f"labels: {len(names)} labels for a matrix of shape {z.shape}")
    heatmap = go.Heatmap(
        z=z,
        x=names,
        y=names,
        zmin=-1,
        zmid=0,
        zmax=1,
        colorscale=DIVERGING,
        colorbar=colour_bar("cosine", tickvals=[-1, -0.5, 0, 0.5, 1]),
        hovertemplate="vector %{y} and vector %{x}<br>cosine %{z:.3f}<extra></extra>",
    )
    kind = "linear" if names is None else "category"
    across = axis("vector", showgrid=False, constrain="domain", type=kind)
    across |= whole_numbers(max(z.shape))
    down = across | {"autorange": "reversed", "scaleanchor": "x"}
    return go.Figure(heatmap, layout(title, 640, 740, xaxis=across, yaxis=down))


@shape_checked
def transfer_heatmap(
    transferred: pd.DataFrame, title: str = "Effect on other prompts"
) -> go.Figure:
    """Draw the KL of every vector on every prompt; hovering shows what the model writes.

    Args:
        transferred: as `analysis.transfer` gives it.
        title: above the figure; "" for none.

    Raises:
        ValueError: a column is missing, or there are no rows.
    """
    columns = ("prompt", "vector", "kl", "completion", "unsteered_completion")
    check_frame(transferred, "transferred", columns)
    n_vectors = len(set(transferred["vector"]))
    prompts = transferred["prompt"].to_numpy()[::n_vectors]
    hover = [
        f"vector {vector}, KL {kl:.4g}<br>{wrapped(completion)}<br><br>unsteered:<br>"
        f"{wrapped(unsteered)}"
        for vector, kl, completion, unsteered in zip(
            *(transferred[column] for column in columns[1:]), strict=True
        )
    ]
    heatmap = go.Heatmap(
        z=transferred["kl"].to_numpy().reshape(-1, n_vectors),
        x=transferred["vector"].to_numpy()[:n_vectors],
        customdata=np.array(hover).reshape(-1, n_vectors),
        zmin=0,
        zmax=max(transferred["kl"]),
        colorscale=SEQUENTIAL,
        colorbar=colour_bar("KL to unsteered (nats)", side="bottom"),
        hovertemplate=HOVER,
    )
    down = axis(
        None,
        showgrid=False,
        autorange="reversed",
        automargin=True,
        # By number, not by name: two prompts may begin alike.
        tickvals=list(range(len(prompts))),
        ticktext=[wrapped(prompt, 40) for prompt in prompts],
    )
    height = max(440, 240 + 32 * len(prompts))
    across = axis("vector", showgrid=False)
    return go.Figure(heatmap, layout(title, height=height, xaxis=across, yaxis=down))
