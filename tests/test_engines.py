"""vLLM as an engine, by a small server that answers as vLLM with vllm-lens does, or lies."""

import base64
import json
import pickle
import sys
import threading
import types

import numpy as np
import pytest
import torch

import tl_melbo as tm
from tests.judge_server import running
from tests.tiny_models import D_MODEL, tiny_bridge
from tl_melbo.errors import NoAnswer

PROMPTS = ("Tell me about yourself.", "Hi")
KEY = "sk-never-to-be-seen-0123456789"


@pytest.fixture(scope="module")
def model():
    return tiny_bridge("llama")


@pytest.fixture(scope="module")
def found():
    theta = torch.randn(3, D_MODEL, generator=torch.Generator().manual_seed(0))
    return tm.SteeringVectors.from_tensor(theta, source_layer=2)


class VLLM:
    """What answers: the model itself, with a cache of distributions by salt, as vLLM has one."""

    def __init__(self, model, plugin=True, shift=0.0, salted=True):
        self.model, self.plugin, self.shift, self.salted = model, plugin, shift, salted
        self.cache, self.lock = {}, threading.Lock()

    def vector(self, body):
        told = body.get("vllm_xargs", {}).get("apply_steering_vectors")
        if told is None or not self.plugin:
            return None
        (vector,) = json.loads(told)
        assert (vector["scale"], vector["norm_match"]) == (1.0, False)
        packed = vector["activations"]
        assert packed["original_dtype"] == "torch.float32"
        raw = np.frombuffer(base64.b64decode(packed["data"]), packed["dtype"])
        theta = torch.from_numpy(raw.reshape(packed["shape"]).copy())
        return tm.LayeredVectors.from_tensor(theta[None], vector["layer_indices"])

    @torch.no_grad()
    def logits(self, tokens, vector):
        if vector is None:
            return self.model(torch.tensor([tokens]))[0, -1]
        with tm.steered(self.model, vector):
            return self.model(torch.tensor([tokens]))[0, -1]

    def __call__(self, handler):
        with self.lock:  # one vector in the model at a time
            self.answer(handler)

    def answer(self, handler):
        body, vector = handler.body, self.vector(handler.body)
        tokens, new = [*body["prompt"]], []
        key = (body["cache_salt"] if self.salted else "", *tokens)
        for _ in range(body["max_tokens"]):
            logits = self.logits([*tokens, *new], vector)
            if not new:
                logits = self.cache.setdefault(key, logits)
            new.append(int(logits.argmax()))
            if new[-1] in body.get("stop_token_ids", ()):
                break
        choice = {"index": 0, "text": ""}
        if body.get("return_token_ids"):
            choice["token_ids"] = new
        if "logprobs" in body:
            top = self.cache[key].log_softmax(-1).topk(body["logprobs"])
            pairs = zip(top.indices.tolist(), (top.values - self.shift).tolist(), strict=True)
            told = {f"token_id:{token}": value for token, value in pairs}
            choice["logprobs"] = {"top_logprobs": [told]}
        handler.send(json.dumps({"choices": [choice]}))


@pytest.fixture
def server():
    with running() as each:
        yield each


def test_texts_are_the_models_own_and_no_cache_is_shared(server, model, found):
    server.behave = VLLM(model)
    engine = tm.engines.vllm(server.url)
    options = {"scales": [1, -2], "max_new_tokens": 6}
    ours = tm.generate(model, PROMPTS, found, **options)
    told = []
    theirs = tm.generate(
        model, PROMPTS, found, engine=engine, on_batch=lambda *n: told.append(n), **options
    )
    assert theirs.equals(ours)
    assert told == [(12, 12)]
    assert ours["completion"].nunique() > 4
    # Unsteered texts after steered ones, from the same cache.
    again = tm.generate(model, PROMPTS, engine=engine, max_new_tokens=6)
    assert again.equals(tm.generate(model, PROMPTS, max_new_tokens=6))
    written = [body for body in server.asked if "logprobs" not in body]
    salts = {}
    for body in written:
        vector = body.get("vllm_xargs", {}).get("apply_steering_vectors", "none")
        salts.setdefault(body["cache_salt"], set()).add(vector)
    # A salt for each vector at each scale, and one for none.
    assert len(salts) == 7
    assert all(len(vectors) == 1 for vectors in salts.values())
    # One vector a request; the probe came once for the vectors and once for none.
    assert len(written) == 14
    assert len(server.asked) - len(written) == 4


@pytest.mark.slow
def test_several_layers_samples_and_who_takes_an_engine(server, model, found):
    server.behave = VLLM(model)
    engine = tm.engines.vllm(server.url, model="tiny")
    layered = tm.LayeredVectors.from_tensor(found.vectors[:2][None], [1, 3])
    ours = tm.generate(model, PROMPTS, layered, max_new_tokens=4)
    assert tm.generate(model, PROMPTS, layered, max_new_tokens=4, engine=engine).equals(ours)
    options = {"max_new_tokens": 4, "engine": engine}
    samples = tm.generate(model, "Hi", found[0], n_samples=3, temperature=0.5, **options)
    drawn = server.asked[-4:]
    assert sorted(body["temperature"] for body in drawn) == [0.0, 0.5, 0.5, 0.5]
    assert len({body["seed"] for body in drawn}) == 4
    assert {body["model"] for body in server.asked} == {"tiny"}
    assert samples["sample"].tolist() == [0, 1, 2, 3]
    frame = tm.report.collect_completions(model, "Hi", found, **options)
    assert frame.equals(tm.report.collect_completions(model, "Hi", found, max_new_tokens=4))
    frame = tm.analysis.transfer(model, found, "Hi", **options)
    assert frame.equals(tm.analysis.transfer(model, found, "Hi", max_new_tokens=4))
    planted = [tm.evaluation.Backdoor("|T|", "a")]
    served, own = (
        tm.evaluation.hit_rate(model, found, planted, "Hi", embedder="words", **how)
        for how in (options, {"max_new_tokens": 4})
    )
    assert served.equals(own)
    judge = tm.judges.local(model, 4, engine=engine)
    assert judge("Hi") == tm.judges.local(model, 4)("Hi")


@pytest.mark.parametrize(
    ("lie", "message"),
    [
        ({"plugin": False}, "leaves the vector out; is its plugin"),
        ({"shift": 0.2}, "with a vector are others"),
        ({"salted": False}, "one request changes the next"),
    ],
)
def test_an_engine_that_does_something_else_is_refused(server, model, found, lie, message):
    server.behave = VLLM(model, **lie)
    engine = tm.engines.vllm(server.url)
    for _ in range(2):  # and not only the first time
        with pytest.raises(ValueError, match=message):
            tm.generate(model, "Hi", found, engine=engine, max_new_tokens=3)
    # No text was asked for.
    assert all("logprobs" in body for body in server.asked)
    assert "hub" not in repr(engine)


def test_a_wide_tolerance_does_not_pass_for_steered_what_is_not(server, model, found):
    server.behave = VLLM(model, plugin=False)
    engine = tm.engines.vllm(server.url, tolerance=1e3)
    with pytest.raises(ValueError, match="leaves the vector out; is its plugin"):
        tm.generate(model, "Hi", found, engine=engine, max_new_tokens=3)


def test_a_text_that_vllm_breaks_off_is_not_taken_for_whole(monkeypatch, model, found):
    """As offline vLLM does where prompt and text are longer than its max_model_len."""

    def made(**facts):
        return types.SimpleNamespace(**facts)

    class Library:
        SamplingParams = made

        def __init__(self, *_, **__):
            pass

        def generate(self, prompts, params, use_tqdm):
            return [made(outputs=[made(token_ids=[5, 6])]) for _ in prompts]

    monkeypatch.setitem(sys.modules, "vllm", made(LLM=Library, SamplingParams=made))
    monkeypatch.setitem(sys.modules, "vllm_lens", made(SteeringVector=made))
    engine = tm.engines.vllm("folder")
    monkeypatch.setattr("tl_melbo.engines._request._check_agreement", lambda *_: None)
    with pytest.raises(ValueError, match="after 2 of max_new_tokens=3; give it a larger max_model"):
        tm.generate(model, "Hi", found, engine=engine, max_new_tokens=3)
    assert len(tm.generate(model, "Hi", found, engine=engine, max_new_tokens=2)) == 3


def test_what_an_engine_cannot_do_is_refused(server, model, found):
    server.behave = VLLM(model)
    engine = tm.engines.vllm(server.url)
    adapter = tm.Adapter(
        torch.randn(1, 1, D_MODEL, 2),
        torch.randn(1, 1, 2, D_MODEL),
        story={"layers": [1, 2], "hyperparameters": {"length": 1.0}},
    )
    with pytest.raises(ValueError, match="no adapters or gated factors"):
        tm.generate(model, "Hi", adapter, engine=engine)
    with pytest.raises(ValueError, match="cannot be seen whether"):
        tm.generate(model, "Hi", 1e-6 * found, engine=engine)
    with pytest.raises(ValueError, match="set where the server is started"):
        tm.engines.vllm(server.url, dtype="float32")
    with pytest.raises(ValueError, match="of a server"):
        tm.engines.vllm("folder", model="tiny")
    with pytest.raises(ValueError, match="tolerance=0"):
        tm.engines.vllm(server.url, tolerance=0.0)


def test_without_vllm_the_documentation_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ModuleNotFoundError, match=r"docs/engines\.md"):
        tm.engines.vllm(tmp_path)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("[", r"no choices\[0\]"),
        ('{"choices": ["x"]}', r"no choices\[0\]"),
        ('{"choices": [{"logprobs": null}]}', "no log-probabilities"),
        ('{"choices": [{"logprobs": {"top_logprobs": [{"token_id:1": 3}]}}]}', "that are none"),
        ('{"choices": [{"logprobs": {"top_logprobs": [{"token_id:x": 3}]}}]}', "no log-prob"),
    ],
)
def test_a_server_is_not_trusted(server, model, found, body, message):
    server.behave = lambda handler: handler.send(body)
    with pytest.raises(NoAnswer, match=message):
        tm.generate(model, "Hi", found, engine=tm.engines.vllm(server.url))


@pytest.mark.parametrize("tokens", ["[-1]", "[0, 1, 2, 3, 4]", '["a"]', "null", "[]", "[0, 1]"])
def test_tokens_of_a_server_are_checked(server, model, found, tokens):
    honest = VLLM(model)

    def behave(handler):
        if "logprobs" in handler.body:
            honest(handler)
        else:
            handler.send(f'{{"choices": [{{"token_ids": {tokens}}}]}}')

    server.behave = behave
    with pytest.raises(NoAnswer, match="token_ids"):
        tm.generate(model, "Hi", found, engine=tm.engines.vllm(server.url), max_new_tokens=4)


def test_a_key_shows_nowhere(server, model, found, monkeypatch):
    monkeypatch.setenv("ENGINE_KEY", KEY)
    with pytest.raises(ValueError, match="holds a user, a password or a query") as refused:
        tm.engines.vllm(f"{server.url}?key={KEY}")
    engine = tm.engines.vllm(server.url, api_key_env="ENGINE_KEY", retries=0)
    server.behave = lambda handler: handler.send(f'{{"error": "no {KEY}"}}', 400)
    with pytest.raises(NoAnswer) as answered:
        tm.generate(model, "Hi", found, engine=engine)
    assert server.headers_seen[-1]["Authorization"] == f"Bearer {KEY}"
    shown = [repr(engine), str(refused.value), str(answered.value), str(pickle.dumps(engine))]
    assert not any(KEY in each for each in shown)
