"""A prompt that is read once for many texts: the same texts and numbers as read for each."""

import pandas as pd
import pytest
import torch
from transformers import MambaConfig, MambaForCausalLM

import tl_melbo as tm
from tests.tiny_models import D_MODEL, as_bridge, tokenizer
from tl_melbo.analysis._coherence import judged
from tl_melbo.model.tokens import to_tokens

PROMPT = "Once upon a time there was"
OPTIONS = {"layer": 2, "scales": [1, -1], "n_samples": 2, "max_new_tokens": 5}


def vectors():
    generator = torch.Generator().manual_seed(0)
    return 3 * torch.nn.functional.normalize(torch.randn(3, D_MODEL, generator=generator))


@pytest.fixture(scope="module")
def mamba():
    """A model that keeps a state, not the keys and values of single tokens."""
    config = MambaConfig(
        vocab_size=len(tokenizer()), hidden_size=D_MODEL, num_hidden_layers=4, state_size=4,
        eos_token_id=2, pad_token_id=2, bos_token_id=1, initializer_range=0.3,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = MambaForCausalLM(config).eval()
    model.config.architectures = ["MambaForCausalLM"]
    return as_bridge(model, "tiny-mamba")


def test_texts_and_perplexities_as_without_it(every_tiny, monkeypatch):
    shared = tm.generate(every_tiny, PROMPT, vectors(), **OPTIONS)
    pairs = list(zip(shared["prompt"], shared["completion"], strict=True))
    measured = judged(every_tiny, pairs, False, 11.0, 0.4, 4)
    for module in ("generation", "analysis._coherence"):
        monkeypatch.setattr(f"tl_melbo.{module}.read_ahead", lambda *_: {})
    pd.testing.assert_frame_equal(shared, tm.generate(every_tiny, PROMPT, vectors(), **OPTIONS))
    alone = judged(every_tiny, pairs, False, 11.0, 0.4, 4)
    pd.testing.assert_frame_equal(measured, alone, rtol=1e-4)


def test_a_model_that_keeps_a_state_writes_and_is_read(mamba, unchanged):
    unchanged(mamba)
    frame = tm.generate(mamba, [PROMPT, "Hi"], vectors(), **OPTIONS)
    one = tm.generate(mamba, [PROMPT, "Hi"], vectors(), batch_size=1, **OPTIONS)
    assert frame["completion"].nunique() > len(frame) / 2
    pd.testing.assert_frame_equal(frame, one)
    found = tm.analysis.behaviours(mamba, frame, largest_perplexity=1e9, embedder="words")
    row = found.texts.iloc[0]
    before = to_tokens(mamba, PROMPT)
    text = torch.tensor([mamba.tokenizer.encode(row["completion"], add_special_tokens=False)])
    with torch.no_grad():
        logits = mamba(torch.cat([before, text], 1))[:, before.shape[1] - 1 : -1]
    loss = torch.nn.functional.cross_entropy(logits[0].double(), text[0])
    assert row["perplexity"] == pytest.approx(float(loss.exp()), rel=1e-4)
