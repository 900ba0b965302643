"""Questions to ask of vectors that were found: one file a question."""

from tl_melbo.analysis.composition import composition
from tl_melbo.analysis.distance import effect_distance
from tl_melbo.analysis.divergence import kl_baselines, kl_divergence, kl_from_log_probs
from tl_melbo.analysis.family import family
from tl_melbo.analysis.presence import presence, presence_statistics
from tl_melbo.analysis.scaling import repetition, rescale, scale_sweep
from tl_melbo.analysis.similarity import cosine_similarity
from tl_melbo.analysis.transfer import transfer

__all__ = [
    "composition",
    "cosine_similarity",
    "effect_distance",
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
