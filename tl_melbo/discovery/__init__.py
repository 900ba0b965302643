"""Methods that find vectors: one file a method, each takes f, never a model."""

from tl_melbo.discovery.melbo import Step, melbo, melbo_objective

__all__ = ["Step", "melbo", "melbo_objective"]
