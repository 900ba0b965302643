"""vLLM with the plugin vllm-lens: in this process, or behind its OpenAI-compatible server.

The plugin adds a vector after a block, at every position, of one request alone. A `cache_salt` of
the vector keeps its keys and values from being read under another one.
"""

import base64
import importlib
import json
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from torch import Tensor

from tl_melbo import checks
from tl_melbo.engines._request import Engine, Request
from tl_melbo.serving import Server
from tl_melbo.shapes import shape_checked

# The most that a vLLM server tells by default.
_TOP = 20
# Requests to a server.
_AT_ONCE = 64
_NAMED = "token_id:"


@shape_checked
def vllm(
    place: str | Path,
    *,
    model: str | None = None,
    api_key_env: str | None = None,
    tolerance: float = 0.05,
    timeout: float = 600.0,
    retries: int = 2,
    **options: Any,
) -> Engine:
    """VLLM as an engine: `tm.generate(model, prompts, found, engine=tm.engines.vllm(folder))`.

    Before its first texts, its log-probabilities are compared with the model's, with the vector and
    without: one that leaves the vector out is refused. docs/engines.md says how to install it.

    Args:
        place: the folder of a checkpoint, or its id on the hub, which vLLM loads into this process;
            or the address of a server with its "/v1".
        model: as a server calls it; None takes the one that it serves.
        api_key_env: the environment variable that holds the server's key, if it has one. The key is
            never shown, saved or logged by this package.
        tolerance: how far log-probabilities may be apart on average, in nats: 1e-4 was measured in
            float32; narrow types need more.
        timeout: of a request to a server, in seconds; `retries` of it.
        options: of `vllm.LLM`, such as dtype="float32"; for a checkpoint only.

    Raises:
        ModuleNotFoundError: vLLM or its plugin is not installed (openai, for a server).
        ValueError: an argument out of its range, an address with a key in it.
        NoAnswer: when asked, if the server cannot be reached, refuses, or sends something else.
    """
    checks.positive(tolerance=tolerance, timeout=timeout)
    checks.at_least(0, retries=retries)
    if str(place).startswith(("http://", "https://")):
        if options:
            raise ValueError(f"options: {sorted(options)} are set where the server is started")
        checks.installed("openai", "engines.vllm", "judges")
        server = Server(str(place), api_key_env, timeout, retries)
        server.key()  # or say at once that there is none
        return _ServedVLLM(server, model, tolerance)
    if model is not None or api_key_env is not None:
        raise ValueError("model, api_key_env: of a server; leave them out for a checkpoint")
    try:
        engine, plugin = map(importlib.import_module, ("vllm", "vllm_lens"))
    except ModuleNotFoundError as error:
        advice = "see docs/engines.md, or pass the address of a server"
        raise ModuleNotFoundError(f"engines.vllm: needs {error.name}; {advice}") from error
    options = {"max_logprobs": _TOP, "disable_log_stats": True, **options}
    return _LocalVLLM(engine, plugin, str(place), options, tolerance)


class _LocalVLLM:
    """In this process."""

    def __init__(
        self, library: Any, plugin: Any, place: str, options: dict[str, Any], tolerance: float
    ) -> None:
        self._library, self._plugin, self.place = library, plugin, place
        self._llm = library.LLM(place, **options)
        self.tolerance, self.agreed = tolerance, set()

    def write(
        self, requests: Sequence[Request], max_new_tokens: int, ends: Sequence[int]
    ) -> list[list[int]]:
        """The new tokens of each."""
        # Ours alone end a text; the vocabulary may know others.
        options = {"max_tokens": max_new_tokens, "stop_token_ids": [*ends], "ignore_eos": True}
        texts = [[*out.outputs[0].token_ids] for out in self._run(requests, options)]
        for tokens in texts:
            if _broke_off(tokens, max_new_tokens, ends):
                short = f"broke a text off after {len(tokens)} of max_new_tokens={max_new_tokens}"
                raise ValueError(f"engine: {self!r} {short}; give it a larger max_model_len")
        return texts

    def log_probs(self, requests: Sequence[Request]) -> list[dict[int, float]]:
        """Of the likeliest next tokens."""
        outs = self._run(requests, {"max_tokens": 1, "logprobs": _TOP})
        tops = [out.outputs[0].logprobs[0] for out in outs]
        return [{token: each.logprob for token, each in top.items()} for top in tops]

    def _run(self, requests: Sequence[Request], options: dict[str, Any]) -> Any:
        prompts = [{"prompt_token_ids": [*r.tokens], "cache_salt": r.salt} for r in requests]
        # New ones at each call: the plugin takes the vector out of them.
        params = []
        for request in requests:
            own: dict[str, Any] = {"temperature": request.temperature, "seed": request.seed}
            if request.theta is not None:
                vector = {"activations": request.theta.clone(), "layer_indices": [*request.layers]}
                steering = self._plugin.SteeringVector(**vector, scale=1.0, norm_match=False)
                own["extra_args"] = {"apply_steering_vectors": [steering]}
            params.append(self._library.SamplingParams(detokenize=False, **own, **options))
        return self._llm.generate(prompts, params, use_tqdm=False)

    def __repr__(self) -> str:
        return f"engines.vllm({Path(self.place).name!r})"


class _ServedVLLM:
    """Behind a server."""

    def __init__(self, server: Server, model: str | None, tolerance: float) -> None:
        self.server, self.model = server, model
        self.tolerance, self.agreed = tolerance, set()

    def write(
        self, requests: Sequence[Request], max_new_tokens: int, ends: Sequence[int]
    ) -> list[list[int]]:
        """The new tokens of each."""
        options = {"max_tokens": max_new_tokens, "stop_token_ids": [*ends], "ignore_eos": True}
        options["return_token_ids"] = True
        choices = self._ask(requests, options)
        return [self._tokens(choice, max_new_tokens, ends) for choice in choices]

    def log_probs(self, requests: Sequence[Request]) -> list[dict[int, float]]:
        """Of the likeliest next tokens."""
        options = {"max_tokens": 1, "logprobs": _TOP, "return_tokens_as_token_ids": True}
        return [self._top(choice) for choice in self._ask(requests, options)]

    def _ask(self, requests: Sequence[Request], options: dict[str, Any]) -> list[dict[str, Any]]:
        with ThreadPoolExecutor(min(_AT_ONCE, len(requests))) as several:
            return list(several.map(lambda request: self._choice(request, options), requests))

    def _choice(self, request: Request, options: dict[str, Any]) -> dict[str, Any]:
        asked = {"prompt": [*request.tokens], "cache_salt": request.salt, "seed": request.seed}
        asked |= {"temperature": request.temperature, **options}
        if self.model is not None:
            asked["model"] = self.model
        if request.theta is not None:
            vector = {"activations": _packed(request.theta), "layer_indices": [*request.layers]}
            told = json.dumps([{**vector, "scale": 1.0, "norm_match": False}])
            asked["vllm_xargs"] = {"apply_steering_vectors": told}
        body = self.server.sent("completions", ("model", "prompt"), asked)
        try:
            choice = json.loads(body)["choices"][0]
        except (ValueError, LookupError, TypeError, RecursionError):
            raise self.server.strange("no choices[0]", body) from None
        if not isinstance(choice, dict):
            raise self.server.strange("no choices[0]", body)
        return choice

    def _tokens(self, choice: dict[str, Any], most: int, ends: Sequence[int]) -> list[int]:
        tokens = choice.get("token_ids")
        if not isinstance(tokens, list) or len(tokens) > most:
            raise self.server.strange("no token_ids, or too many", str(tokens))
        if not all(isinstance(token, int) and 0 <= token < 2**31 for token in tokens):
            raise self.server.strange("token_ids that are none", str(tokens))
        if _broke_off(tokens, most, ends):
            raise self.server.strange("token_ids that break off before an end", str(tokens))
        return tokens

    def _top(self, choice: dict[str, Any]) -> dict[int, float]:
        try:
            (top,) = choice["logprobs"]["top_logprobs"]
            found = {int(name.removeprefix(_NAMED)): float(each) for name, each in top.items()}
        except (LookupError, TypeError, ValueError, AttributeError):
            raise self.server.strange("no log-probabilities", str(choice)) from None
        if not all(value <= 0 and math.isfinite(value) for value in found.values()):
            raise self.server.strange("log-probabilities that are none", str(choice))
        return found

    def __repr__(self) -> str:
        return f"engines.vllm({self.server.base_url!r})"


def _broke_off(tokens: Sequence[int], most: int, ends: Sequence[int]) -> bool:
    """Whether a text neither ends nor is as long as asked for, as where vLLM has no more room."""
    return len(tokens) < most and not (tokens and tokens[-1] in ends)


def _packed(theta: Tensor) -> dict[str, Any]:
    """As the plugin reads it: base64 of the bytes, little-endian."""
    data = base64.b64encode(theta.float().contiguous().numpy().astype("<f4").tobytes())
    return {
        "data": data.decode("ascii"),
        "dtype": "float32",
        "original_dtype": "torch.float32",
        "shape": [*theta.shape],
    }
