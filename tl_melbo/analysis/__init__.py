"""Questions to ask of vectors that were found: one file a question.

In all of them `layer=None` adds the vectors after the block that they were found at, `chat=None`
formats prompts as when they were found (as `f` does, where there is one), and `embedder=None` takes
sentences where the embedder is installed, else words. A `reference` is exactly one vector.
"""

from tl_melbo.analysis._behaviours import Behaviours, behaviours
from tl_melbo.analysis._coherence import repetition
from tl_melbo.analysis._completions import transfer
from tl_melbo.analysis._embedding import embeddings
from tl_melbo.analysis._family import composition, family
from tl_melbo.analysis._presence import presence, presence_statistics
from tl_melbo.analysis._scaling import rescale, scale_sweep
from tl_melbo.analysis._similarity import (
    cosine_similarity,
    effect_distance,
    kl_baselines,
    kl_divergence,
)
from tl_melbo.probability import kl_from_log_probs

__all__ = [
    "Behaviours",
    "behaviours",
    "composition",
    "cosine_similarity",
    "effect_distance",
    "embeddings",
    "family",
    "kl_baselines",
    "kl_divergence",
    "kl_from_log_probs",
    "presence",
    "presence_statistics",
    "repetition",
    "rescale",
    "scale_sweep",
    "transfer",
]
