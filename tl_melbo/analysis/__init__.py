"""Questions to ask of vectors that were found: one file a question.

`layer=None` is the layer that the vectors were found at, `chat=None` the prompt format they were
found with (or that of `f`); `embedder=None` takes sentences where that embedder is installed, else
words. `prompt=None` is the first prompt of `f`. A `reference` is exactly one vector.
"""

from tl_melbo.analysis._behaviours import Behaviours, behaviours
from tl_melbo.analysis._coherence import repetition
from tl_melbo.analysis._completions import rescale, scale_sweep, transfer
from tl_melbo.analysis._divergence import token_divergence
from tl_melbo.analysis._effect_by_layer import effect_by_layer
from tl_melbo.analysis._effect_plane import effect_plane
from tl_melbo.analysis._embedding import embeddings
from tl_melbo.analysis._family import composition, family
from tl_melbo.analysis._mechanism import mechanism
from tl_melbo.analysis._mixture import Mixture, mixture
from tl_melbo.analysis._presence import presence, presence_statistics
from tl_melbo.analysis._rates import rates
from tl_melbo.analysis._similarity import (
    cosine_similarity,
    effect_distance,
    kl_baselines,
    kl_divergence,
)
from tl_melbo.analysis._tags import tags
from tl_melbo.analysis._tokens import token_direction
from tl_melbo.analysis._top_tokens import top_tokens
from tl_melbo.probability import kl_from_log_probs

__all__ = [
    "Behaviours",
    "Mixture",
    "behaviours",
    "composition",
    "cosine_similarity",
    "effect_by_layer",
    "effect_distance",
    "effect_plane",
    "embeddings",
    "family",
    "kl_baselines",
    "kl_divergence",
    "kl_from_log_probs",
    "mechanism",
    "mixture",
    "presence",
    "presence_statistics",
    "rates",
    "repetition",
    "rescale",
    "scale_sweep",
    "tags",
    "token_direction",
    "token_divergence",
    "top_tokens",
    "transfer",
]
