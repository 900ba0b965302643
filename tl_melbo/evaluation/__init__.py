"""Does it find what is there? Ground truth, and what a vector costs beside what it does."""

from tl_melbo.analysis._side_effects import reach, side_effects
from tl_melbo.analysis._texts import PASSAGES, UNRELATED_PROMPTS
from tl_melbo.evaluation._atlas import atlas
from tl_melbo.evaluation._atlas_library import Atlas
from tl_melbo.evaluation._dose import DoseResponse, coherent_window, dose_response
from tl_melbo.evaluation._hits import count_hits, hit_rate, layer_sweep
from tl_melbo.evaluation._linearity import (
    Linearity,
    Score,
    linearities,
    linearity,
    linearity_null,
    linearity_score,
)
from tl_melbo.evaluation._pairwise import Pairwise, pairwise
from tl_melbo.evaluation._planted import BACKDOORS, Backdoor, Planted, load_planted
from tl_melbo.evaluation._practice import plant
from tl_melbo.probability import wilson_interval

__all__ = [
    "BACKDOORS",
    "PASSAGES",
    "UNRELATED_PROMPTS",
    "Atlas",
    "Backdoor",
    "DoseResponse",
    "Linearity",
    "Pairwise",
    "Planted",
    "Score",
    "atlas",
    "coherent_window",
    "count_hits",
    "dose_response",
    "hit_rate",
    "layer_sweep",
    "linearities",
    "linearity",
    "linearity_null",
    "linearity_score",
    "load_planted",
    "pairwise",
    "plant",
    "reach",
    "side_effects",
    "wilson_interval",
]
