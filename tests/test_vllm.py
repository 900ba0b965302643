"""vLLM itself, with the plugin vllm-lens, against the model: `make engines`."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager

import pytest
import torch

import tl_melbo as tm
from tl_melbo.engines import Request
from tl_melbo.model.load import load_hugging_face

pytestmark = pytest.mark.engines
pytest.importorskip("vllm", reason="vLLM is not in this environment: make engines")

LAYER = 8
PROMPTS = (
    "Tell me about yourself.",
    "What is the capital of France?",
    "Write a short story about a robot.",
    # Longer than a block of vLLM's cache, so that there is a prefix to be read again.
    "Summarise this. " + "The river runs past the old mill, where children watch the ducks. " * 20,
)
SETTINGS = {"dtype": "float32", "max_model_len": 1024, "enforce_eager": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The bundled model as a checkpoint."""
    path = tmp_path_factory.mktemp("bundled") / "model"
    for part in load_hugging_face(None, "cpu", torch.float32)[:2]:
        part.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def found(model):
    theta = torch.randn(5, 576, generator=torch.Generator().manual_seed(0))
    theta = 20 * theta / theta.norm(dim=-1, keepdim=True)
    return tm.SteeringVectors.from_tensor(theta, source_layer=LAYER)


@pytest.fixture(scope="module")
def ours(model, found):
    return texts(model, found)


def texts(model, found, **options):
    options |= {"chat": True, "max_new_tokens": 40}
    steered = tm.generate(model, PROMPTS, found, **options)["completion"].tolist()
    return steered + tm.generate(model, PROMPTS, **options)["completion"].tolist()


# Before anything imports vLLM; its servers get them, too. Without the last, most memory is taken.
os.environ |= {"VLLM_HOST_IP": "127.0.0.1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")


@pytest.fixture(scope="module")
def offline(folder):
    return tm.engines.vllm(folder, enable_prefix_caching=True, **SETTINGS)


def test_24_texts_are_the_models_own(model, found, ours, offline):
    theirs = texts(model, found, engine=offline)
    assert len(ours) == 24
    # Most vectors do something, or there would be nothing to see.
    assert len({*ours}) > 12
    same = sum(one == other for one, other in zip(ours, theirs, strict=True))
    assert same == 24, [pair for pair in zip(ours, theirs, strict=True) if pair[0] != pair[1]]
    # Once more: prefixes come from the cache now, each from that of its own vector.
    assert texts(model, found, engine=offline) == ours


def test_log_probs_agree(model, found, offline):
    tokens = tuple(model.to_tokens(PROMPTS[-1])[0].tolist())
    for theta in (None, *found.vectors[:, None]):
        vectors = None if theta is None else tm.SteeringVectors.from_tensor(theta)
        own = tm.next_token_log_probs(model, PROMPTS[-1], vectors, layer=LAYER, chat=False)[0]
        (theirs,) = offline.log_probs([Request(tokens, theta, (LAYER,))])
        assert len(theirs) >= 20
        apart = [abs(float(own[token]) - value) for token, value in theirs.items()]
        assert max(apart) < 1e-3


def test_a_cache_that_vectors_share_would_be_noticed(model, found, offline, monkeypatch):
    """The control: with one salt for all, vLLM does read steered keys, and is refused."""
    monkeypatch.setattr(offline, "agreed", set())
    begin = Request.__post_init__

    def unsalted(self):
        begin(self)
        object.__setattr__(self, "salt", "one for all")

    monkeypatch.setattr(Request, "__post_init__", unsalted)
    # A prompt long enough, and not in the cache yet.
    prompt = f"Now. {PROMPTS[-1]}"
    with pytest.raises(ValueError, match="one request changes the next"):
        tm.generate(model, prompt, found, engine=offline, chat=True, max_new_tokens=4)


@contextmanager
def serving(folder, **environment):
    """A server in a process of its own, ended with it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32"]
    command += ["--max-model-len", "1024", "--enforce-eager"]
    log = folder.parent / f"{port}.log"
    with log.open("w") as out:
        process = subprocess.Popen(
            command,
            env={**os.environ, **environment},
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
        try:
            for _ in range(300):
                assert process.poll() is None, log.read_text()[-2000:]
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                    break
                except OSError:
                    time.sleep(2)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(60)


@pytest.fixture(scope="module")
def url(folder):
    with serving(folder) as address:
        yield address


def test_a_server(model, found, ours, url):
    assert texts(model, found, engine=tm.engines.vllm(url)) == ours


def test_inspect_steers_through_the_server(found, ours, url, folder, tmp_path):
    """The recipe of docs/engines.md."""
    from inspect_ai import Task, eval
    from inspect_ai.dataset import Sample
    from inspect_ai.model import GenerateConfig, get_model
    from inspect_ai.scorer import includes
    from inspect_ai.solver import generate
    from vllm_lens import SteeringVector

    for number, vector in enumerate(found.vectors):
        added = SteeringVector(activations=vector[None], layer_indices=[LAYER])
        body = {"extra_args": {"apply_steering_vectors": [added]}, "cache_salt": f"vector {number}"}
        config = GenerateConfig(temperature=0, max_tokens=40, extra_body=body)
        steered = get_model(f"vllm-lens/{folder}", base_url=url, api_key="none", config=config)
        samples = [Sample(input=prompt, target="Paris") for prompt in PROMPTS]
        task = Task(samples, solver=generate(), scorer=includes())
        (log,) = eval(task, model=steered, log_dir=str(tmp_path), display="none")
        assert log.status == "success", log.error
        written = [sample.output.completion for sample in log.samples]
        assert [text.strip() for text in written] == [text.strip() for text in ours[number:20:5]]


def test_a_server_without_the_plugin_is_refused(model, found, folder):
    with serving(folder, VLLM_PLUGINS="none") as url:
        engine = tm.engines.vllm(url)
        with pytest.raises(ValueError, match="is its plugin, vllm-lens, installed there"):
            tm.generate(model, PROMPTS[0], found, engine=engine, chat=True)
        assert len(tm.generate(model, PROMPTS[0], engine=engine, chat=True, max_new_tokens=2)) == 1
