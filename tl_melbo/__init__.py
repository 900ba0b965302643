"""Unsupervised steering vectors for TransformerLens models."""

import importlib
from typing import TYPE_CHECKING, Any

from tl_melbo.ablation import ablated
from tl_melbo.activation_map import ActivationMap
from tl_melbo.adapters import Adapter, divergence_adapter
from tl_melbo.concatenation import concatenate
from tl_melbo.discovery import (
    calibrate_radius,
    contrastive,
    dct,
    iter_melbo,
    iter_melbo_ortho,
    jacobian,
    join_family,
    join_library,
    melbo,
    melbo_objective,
    melbo_ortho,
    random_vectors,
    ranked,
)
from tl_melbo.gated import GatedFactors, gated_factors
from tl_melbo.generation import generate
from tl_melbo.layered import LayeredVectors
from tl_melbo.model.load import load_model
from tl_melbo.presets import PRESETS
from tl_melbo.reading import next_token_log_probs
from tl_melbo.run import Run
from tl_melbo.steering import steered
from tl_melbo.vectors import SteeringVectors

if TYPE_CHECKING:
    from tl_melbo import adapters, analysis, engines, evaluation, judges, plots, report
    from tl_melbo.sweeps import sweep

__version__ = "0.2.0"

__all__ = [
    "PRESETS",
    "ActivationMap",
    "Adapter",
    "GatedFactors",
    "LayeredVectors",
    "Run",
    "SteeringVectors",
    "ablated",
    "adapters",
    "analysis",
    "calibrate_radius",
    "concatenate",
    "contrastive",
    "dct",
    "divergence_adapter",
    "engines",
    "evaluation",
    "gated_factors",
    "generate",
    "iter_melbo",
    "iter_melbo_ortho",
    "jacobian",
    "join_family",
    "join_library",
    "judges",
    "load_model",
    "melbo",
    "melbo_objective",
    "melbo_ortho",
    "next_token_log_probs",
    "plots",
    "random_vectors",
    "ranked",
    "report",
    "steered",
    "sweep",
]

# These pull in plotly, pandas and the like; they load when first used, so that importing the
# package stays quick.
# models: the old path of model
_LAZY = ("analysis", "engines", "evaluation", "judges", "models", "plots", "report")


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return importlib.import_module(f"tl_melbo.{name}")
    if name == "sweep":
        return importlib.import_module("tl_melbo.sweeps").sweep
    raise AttributeError(f"module 'tl_melbo' has no attribute {name!r}")
