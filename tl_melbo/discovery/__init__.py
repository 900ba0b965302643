"""Methods that find vectors: one file a method, each takes f, never a model."""

from tl_melbo.discovery._calibration import calibrate_radius
from tl_melbo.discovery._contrastive import contrastive
from tl_melbo.discovery._dct import dct, ranked
from tl_melbo.discovery._jacobian import jacobian
from tl_melbo.discovery._map import EffectMap, value_and_gradient
from tl_melbo.discovery._melbo import Step, iter_melbo, join_library, melbo, melbo_objective
from tl_melbo.discovery._melbo_ortho import OrthoStep, iter_melbo_ortho, join_family, melbo_ortho
from tl_melbo.discovery._random import random_vectors
from tl_melbo.discovery._search import Method, Part, Search, join, method, one_by_one

__all__ = [
    "EffectMap",
    "Method",
    "OrthoStep",
    "Part",
    "Search",
    "Step",
    "calibrate_radius",
    "contrastive",
    "dct",
    "iter_melbo",
    "iter_melbo_ortho",
    "jacobian",
    "join",
    "join_family",
    "join_library",
    "melbo",
    "melbo_objective",
    "melbo_ortho",
    "method",
    "one_by_one",
    "random_vectors",
    "ranked",
    "value_and_gradient",
]
