"""Gated factors: steering vectors of several blocks, each with an input gate in attention."""

from tl_melbo.gated._factors import GatedFactors
from tl_melbo.gated._search import gated_factors

__all__ = ["GatedFactors", "gated_factors"]
