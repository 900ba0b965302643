"""A small page's parts, and a large page in a browser: made once for all tests of the page."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

import tl_melbo as tm
from tests.page.browser import opened_at, write
from tl_melbo import report

PROMPTS = ["Tell me about yourself.", "Name a colour."]


@pytest.fixture(scope="session")
def f(tiny_llama: torch.nn.Module) -> tm.ActivationMap:
    return tm.ActivationMap.from_prompts(tiny_llama, PROMPTS, 1, 4, chat=True)


@pytest.fixture(scope="session")
def found(f: tm.ActivationMap) -> tm.SteeringVectors:
    return tm.melbo(f, n_vectors=5, radius=4.0, steps=3)


@pytest.fixture(scope="session")
def completions(tiny_llama: torch.nn.Module, found: tm.SteeringVectors) -> pd.DataFrame:
    return report.collect_completions(tiny_llama, PROMPTS, found, max_new_tokens=3)


@pytest.fixture(scope="session")
def page(tiny_llama: torch.nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tiny_llama, tmp_path_factory.mktemp("page with spaces & more"))


@pytest.fixture(params=[1300, pytest.param(390, marks=pytest.mark.slow)], ids=["laptop", "phone"])
def opened(request: pytest.FixtureRequest, driver: Any, page: Path) -> Iterator[Any]:
    yield from opened_at(driver, page, request.param)


@pytest.fixture
def laptop(driver: Any, page: Path) -> Iterator[Any]:
    """For what hangs on no width."""
    yield from opened_at(driver, page, 1300)
