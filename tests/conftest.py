"""What several tests need: the embedded model, tiny random ones, a browser; and how they run."""

import hashlib
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings

# Before anything imports huggingface_hub: tests never wait for a network.
os.environ["HF_HUB_OFFLINE"] = "1"
# Converted models are kept in the checkout, not in the home of whoever runs the tests.
os.environ.setdefault("TL_MELBO_CACHE", str(Path(__file__).parents[1] / ".cache"))

import tl_melbo as tm
from tests.tiny_models import (
    TINY_ARCHITECTURES,
    tiny_bridge,
    tiny_hf,
    tiny_hooked_llama,
    tokenizer,
)

# Each worker of pytest-xdist has a core of its own, and tiny matrices gain nothing from two.
# TL_MELBO_TEST_THREADS says otherwise: `make test-everywhere` tests one thread and two.
if n_threads := os.environ.get(
    "TL_MELBO_TEST_THREADS", "1" if "PYTEST_XDIST_WORKER" in os.environ else ""
):
    torch.set_num_threads(int(n_threads))

# Deadlines measure the machine, not the code. HYPOTHESIS_PROFILE=nightly looks longer.
for profile, max_examples in (("quick", 30), ("nightly", 200)):
    settings.register_profile(
        profile,
        deadline=None,
        max_examples=max_examples,
        suppress_health_check=[HealthCheck.too_slow],
    )
PROFILE = os.environ.get("HYPOTHESIS_PROFILE", "quick")
settings.load_profile(PROFILE)

PROMPT = "Tell me about yourself."
# Tested in full by the quick tests; the others by a contract (`every_tiny`), in full by the slow.
IN_FULL = ("llama", "gpt2")
ALL_ARCHITECTURES = [
    pytest.param(name, marks=() if name in IN_FULL else pytest.mark.slow)
    for name in TINY_ARCHITECTURES
]


def fingerprint(model: torch.nn.Module) -> str:
    """Everything that a public call must leave alone: weights, flags and hooks, bit for bit."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    flags = [(name, p.requires_grad, p.grad is None) for name, p in model.named_parameters()]
    modes = [(name, module.training) for name, module in model.named_modules()]
    hooks = [
        (name, list(module._forward_hooks), list(module._forward_pre_hooks))
        for name, module in model.named_modules()
        if module._forward_hooks or module._forward_pre_hooks
    ]
    digest.update(repr((flags, modes, hooks)).encode())
    return digest.hexdigest()


@pytest.fixture(scope="session")
def model() -> torch.nn.Module:
    return tm.load_model()


@pytest.fixture(scope="session")
def f(model: torch.nn.Module) -> tm.ActivationMap:
    return tm.ActivationMap.from_prompts(model, PROMPT, chat=True)


@pytest.fixture
def unchanged() -> Iterator[Callable[[torch.nn.Module], None]]:
    """Call it with a model: at the end of the test, that model must be as it was."""
    watched: list[tuple[torch.nn.Module, str, torch.Tensor]] = []

    def watch(model: torch.nn.Module) -> None:
        # The bridge installs hooks of its own at its first forward pass.
        with torch.no_grad():
            model(model.to_tokens(PROMPT))
        watched.append((model, fingerprint(model), torch.random.get_rng_state()))

    yield watch
    for model, before, state in watched:
        assert fingerprint(model) == before, "the model was changed"
        assert torch.equal(torch.random.get_rng_state(), state), "global random state changed"


@pytest.fixture(scope="session")
def _tiny_bridges() -> Callable[[str], torch.nn.Module]:
    made: dict[str, torch.nn.Module] = {}

    def get(architecture: str) -> torch.nn.Module:
        if architecture not in made:
            made[architecture] = tiny_bridge(architecture)
        return made[architecture]

    return get


@pytest.fixture(params=ALL_ARCHITECTURES)
def tiny(request: pytest.FixtureRequest, _tiny_bridges: Callable) -> torch.nn.Module:
    return _tiny_bridges(request.param)


@pytest.fixture(params=TINY_ARCHITECTURES)
def every_tiny(request: pytest.FixtureRequest, _tiny_bridges: Callable) -> torch.nn.Module:
    """For the contract that each architecture keeps: values, gradient, search, writing."""
    return _tiny_bridges(request.param)


@pytest.fixture(scope="session")
def tiny_llama() -> torch.nn.Module:
    return tiny_bridge("llama")


@pytest.fixture(scope="session")
def hooked_and_bridge() -> tuple[torch.nn.Module, torch.nn.Module]:
    """The same weights as a HookedTransformer and as a bridge; TransformerLens 3 only."""
    if int(version("transformer-lens").split(".")[0]) >= 4:
        pytest.skip("HookedTransformer is gone in TransformerLens 4")
    return tiny_hooked_llama(), tiny_bridge("llama")


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model as a user would have one: a folder of files."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_hf("llama").save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


SWITCHES = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1",
)


def found_or_none(*programs: str) -> str | None:
    return next((path for program in programs if (path := shutil.which(program))), None)


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A browser to look at pages with; skipped where there is none, unless CI is set."""
    chromium = found_or_none("chromium", "chromium-browser", "google-chrome")
    chromedriver = found_or_none("chromedriver")
    if chromium is None or chromedriver is None:
        message = "needs chromium and chromedriver; on Debian: apt install chromium chromium-driver"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for switch in (*SWITCHES, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(switch)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    browser = webdriver.Chrome(options=options, service=Service(chromedriver))
    yield browser
    browser.quit()


def wait_for(driver: Any, script: str) -> None:
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(driver, 30).until(lambda browser: browser.execute_script(script))


def patch_everywhere(patch: pytest.MonkeyPatch, name: str, value: Any) -> None:
    """In whichever of our modules uses it: where a name is at home may change."""
    ours = [m for n, m in [*sys.modules.items()] if n.startswith("tl_melbo") and name in vars(m)]
    assert ours, f"{name} is not used any more"
    for module in ours:
        patch.setattr(module, name, value)


@pytest.fixture
def by_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts are grouped by their words: the sentence embedder has tests of its own."""
    patch_everywhere(monkeypatch, "default_embedder", lambda: "words")


@pytest.fixture
def loads_anew() -> None:
    """For a test whose model is to be loaded from its files, as a user's call loads it."""


@pytest.fixture(scope="session")
def _loaded() -> dict[Any, torch.nn.Module]:
    return {}


@pytest.fixture
def cached_models(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, _loaded: dict
) -> None:
    """Folders are loaded once, for all commands but those of a test that asks for `loads_anew`."""
    load = tm.load_model

    def load_once(name: Any = None, **options: Any) -> torch.nn.Module:
        if name is None or not Path(name).is_dir():
            return load(name, **options)
        key = (str(name), *sorted(map(str, options.items())))
        if key not in _loaded:
            _loaded[key] = load(name, **options)
        return _loaded[key]

    if "loads_anew" not in request.fixturenames:
        monkeypatch.setattr(tm, "load_model", load_once)
