"""Questions to ask of vectors that were found: one file a question."""

from tl_melbo.analysis.divergence import kl_divergence, kl_from_log_probs
from tl_melbo.analysis.similarity import cosine_similarity

__all__ = ["cosine_similarity", "kl_divergence", "kl_from_log_probs"]
