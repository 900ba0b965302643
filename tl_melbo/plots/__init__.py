"""Numbers to figures: plotly, returned and never shown, readable by colour-blind eyes."""

from tl_melbo.plots._composition import composition_curves, scale_curves
from tl_melbo.plots._curves import (
    distance_curve,
    kl_curve,
    moving_average,
    norm_curve,
    objective_history,
)
from tl_melbo.plots._heatmaps import cosine_heatmap, transfer_heatmap
from tl_melbo.plots._points import presence_points, specificity_points
from tl_melbo.plots._tokens import token_presence

__all__ = [
    "composition_curves",
    "cosine_heatmap",
    "distance_curve",
    "kl_curve",
    "moving_average",
    "norm_curve",
    "objective_history",
    "presence_points",
    "scale_curves",
    "specificity_points",
    "token_presence",
    "transfer_heatmap",
]
