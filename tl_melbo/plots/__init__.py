"""Numbers to figures: plotly, returned and never shown, readable by colour-blind eyes.

Every `title` stands above its figure; "" leaves it out. `figure.layout.meta["alt"]` tells in a
sentence or two what it shows, for who cannot see it.
"""

from tl_melbo.plots._experiments import (
    behaviour_rates,
    description_heatmap,
    dose_response,
    pairwise,
    sweep_layers,
    sweep_radius,
)
from tl_melbo.plots._frames import (
    atlas_heatmap,
    composition_curves,
    presence_points,
    scale_curves,
    specificity_points,
    transfer_heatmap,
)
from tl_melbo.plots._inside import effect_by_layer, mechanism, top_tokens
from tl_melbo.plots._library import (
    cosine_heatmap,
    distance_curve,
    effect_map,
    kl_curve,
    moving_average,
    norm_curve,
    objective_history,
)
from tl_melbo.plots._tokens import token_divergence, token_presence

__all__ = [
    "atlas_heatmap",
    "behaviour_rates",
    "composition_curves",
    "cosine_heatmap",
    "description_heatmap",
    "distance_curve",
    "dose_response",
    "effect_by_layer",
    "effect_map",
    "kl_curve",
    "mechanism",
    "moving_average",
    "norm_curve",
    "objective_history",
    "pairwise",
    "presence_points",
    "scale_curves",
    "specificity_points",
    "sweep_layers",
    "sweep_radius",
    "token_divergence",
    "token_presence",
    "top_tokens",
    "transfer_heatmap",
]
