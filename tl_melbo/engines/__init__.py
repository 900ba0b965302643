"""Steered generation outside of this process: vLLM, offline and behind a server."""

from tl_melbo.engines._request import Engine, Request
from tl_melbo.engines._vllm import vllm

__all__ = ["Engine", "Request", "vllm"]
