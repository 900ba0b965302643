"""Models for the tests: the embedded one, and tiny random ones of several architectures."""

import hashlib
import os
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

# Before anything imports huggingface_hub: tests never wait for a network.
os.environ["HF_HUB_OFFLINE"] = "1"
# Converted models are kept in the checkout, not in the home of whoever runs the tests.
os.environ.setdefault("TL_MELBO_CACHE", str(Path(__file__).parents[1] / ".cache"))

import tl_melbo as tm
from tests.tiny_models import TINY_ARCHITECTURES, tiny_bridge, tiny_hooked_llama

# Deadlines measure the machine, not the code.
settings.register_profile(
    "house", deadline=None, max_examples=30, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("house")

PROMPT = "Tell me about yourself."


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


@pytest.fixture(scope="session", params=TINY_ARCHITECTURES)
def tiny(request: pytest.FixtureRequest) -> torch.nn.Module:
    return tiny_bridge(request.param)


@pytest.fixture(scope="session")
def tiny_llama() -> torch.nn.Module:
    return tiny_bridge("llama")


@pytest.fixture(scope="session")
def hooked_and_bridge() -> tuple[torch.nn.Module, torch.nn.Module]:
    """The same weights as a HookedTransformer and as a bridge; TransformerLens 3 only."""
    if int(version("transformer-lens").split(".")[0]) >= 4:
        pytest.skip("HookedTransformer is gone in TransformerLens 4")
    return tiny_hooked_llama(), tiny_bridge("llama")
