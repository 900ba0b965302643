"""Adapters that make a model write something else, and what they add as vectors."""

from tl_melbo.adapters._adapter import Adapter
from tl_melbo.adapters._situations import situations
from tl_melbo.adapters._training import Training, divergence_adapter
from tl_melbo.discovery import join

__all__ = ["Adapter", "Training", "divergence_adapter", "join", "situations"]
