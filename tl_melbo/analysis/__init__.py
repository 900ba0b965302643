"""Questions to ask of vectors that were found: one file a question."""

from tl_melbo.analysis.behaviours import Behaviours, behaviours
from tl_melbo.analysis.composition import composition
from tl_melbo.analysis.distance import effect_distance
from tl_melbo.analysis.divergence import kl_baselines, kl_divergence
from tl_melbo.analysis.embedding import embeddings
from tl_melbo.analysis.family import family
from tl_melbo.analysis.presence import presence, presence_statistics
from tl_melbo.analysis.scaling import repetition, rescale, scale_sweep
from tl_melbo.analysis.similarity import cosine_similarity
from tl_melbo.analysis.transfer import transfer
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
