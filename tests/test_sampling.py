"""Sampled completions: their distribution, their seeds, and the greedy one before them."""

from collections import Counter

import pandas as pd
import pytest
import scipy.stats
import torch

import tl_melbo as tm
from tl_melbo.analysis._completions import collect_completions
from tl_melbo.memory import map_batches
from tl_melbo.model.tokens import to_tokens

pytestmark = pytest.mark.boundary

PROMPT = "Once upon a time"
PER_SCALE = ((2.0, 1), (1.0, 4), (-1.0, 4), (-2.0, 1))


def two_vectors():
    generator = torch.Generator().manual_seed(0)
    return 3 * torch.nn.functional.normalize(torch.randn(2, 32, generator=generator))


@pytest.mark.parametrize("temperature", [0.7, 2.0])
def test_tokens_are_drawn_as_often_as_the_model_says(tiny_llama, temperature):
    options = {"n_samples": 600, "temperature": temperature, "batch_size": 301}
    frame = tm.generate(tiny_llama, PROMPT, max_new_tokens=1, **options)
    drawn = Counter(frame["completion"][frame["sample"] > 0])
    with torch.no_grad():
        logits = tiny_llama(to_tokens(tiny_llama, PROMPT))[0, -1].double()
    # Tokens that are written alike count as one; the rare ones, too.
    expected = Counter()
    for token, p in enumerate((logits / temperature).softmax(-1).tolist()):
        expected[tiny_llama.tokenizer.decode([token], skip_special_tokens=True)] += 600 * p
    often = [text for text, n in expected.items() if n >= 5]
    assert len(often) >= 5
    observed = [drawn[text] for text in often]
    wanted = [expected[text] for text in often]
    rest = 600 - sum(wanted)
    if rest > 1:
        observed, wanted = [*observed, 600 - sum(observed)], [*wanted, rest]
    else:
        wanted = [each * sum(observed) / sum(wanted) for each in wanted]
    assert scipy.stats.chisquare(observed, wanted).pvalue > 0.01


def test_the_batch_size_changes_nothing(tiny, unchanged):
    unchanged(tiny)
    options = {"layer": 2, "scales": [1.0, -1.0], "n_samples": 3, "max_new_tokens": 5, "seed": 3}
    prompts = [PROMPT, "Hi!"]
    frames = [
        tm.generate(tiny, prompts, two_vectors(), batch_size=size, **options) for size in (1, 5, 32)
    ]
    assert all(frame.equals(frames[0]) for frame in frames)
    drawn = frames[0][frames[0]["sample"] > 0]
    assert drawn["completion"].nunique() > len(drawn) / 2


def test_the_greedy_completion_stays_the_first(tiny_llama):
    options = {"layer": 2, "scales": [0.5, -1.0], "max_new_tokens": 5}
    greedy = tm.generate(tiny_llama, [PROMPT, "Hi!"], two_vectors(), **options)
    assert "sample" not in greedy
    frame = tm.generate(tiny_llama, [PROMPT, "Hi!"], two_vectors(), n_samples=2, **options)
    assert frame.columns.tolist() == ["vector", "scale", "sample", "prompt", "completion"]
    assert len(frame) == 3 * len(greedy)
    first = frame[frame["sample"] == 0].drop(columns="sample").reset_index(drop=True)
    assert first.equals(greedy)
    groups = frame.groupby(["prompt", "scale", "vector"])["sample"]
    assert {tuple(samples) for _, samples in groups} == {(0, 1, 2)}


def test_a_row_keeps_its_text_whatever_is_beside_it(tiny_llama):
    options = {"layer": 2, "max_new_tokens": 5}
    few = tm.generate(tiny_llama, PROMPT, two_vectors()[:1], n_samples=1, **options)
    many = tm.generate(
        tiny_llama, [PROMPT, "Hi!"], two_vectors(), scales=[2.0, 1.0], n_samples=3, **options
    )
    assert few.merge(many, on=[*few.columns]).shape[0] == 2
    # One sampled completion without `n_samples` is sample 1.
    drawn = tm.generate(tiny_llama, PROMPT, two_vectors()[:1], temperature=0.7, **options)
    assert drawn["completion"].tolist() == few["completion"][1:].tolist()


def test_the_samples_of_a_prompt_share_its_reading(tiny_llama, monkeypatch):
    embedding, read = torch.nn.functional.embedding, []

    def spy(tokens, *args, **kwargs):
        read.append(tuple(tokens.shape))
        return embedding(tokens, *args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "embedding", spy)
    options = {"layer": 2, "n_samples": 3, "max_new_tokens": 2}
    tm.generate(tiny_llama, PROMPT, two_vectors(), scales=[1, -1], **options)
    length = to_tokens(tiny_llama, PROMPT).shape[1]
    if hasattr(tiny_llama, "original_model"):
        assert read == [(1, length - 1), (16, 1), (16, 1)]
    else:
        assert read == [(16, length), (16, 1)]


def test_prompts_of_one_length_are_written_together(tiny, monkeypatch):
    prompts = [PROMPT, "Hi!", "Once upon a day", "Once upon a night", "Hi?", PROMPT]
    lengths = [to_tokens(tiny, prompt).shape[1] for prompt in prompts]
    assert len({*lengths}) < len(prompts)
    embedding, read = torch.nn.functional.embedding, []

    def spy(tokens, *args, **kwargs):
        read.append(tuple(tokens.shape))
        return embedding(tokens, *args, **kwargs)

    told = []
    options = {"layer": 2, "n_samples": 1, "max_new_tokens": 3}
    expected = [tm.generate(tiny, each, two_vectors(), **options) for each in prompts]
    monkeypatch.setattr(torch.nn.functional, "embedding", spy)
    found = tm.generate(
        tiny, prompts, two_vectors(), on_batch=lambda *counts: told.append(counts), **options
    )
    greedy = found[found["sample"] == 0].reset_index(drop=True)
    alone = pd.concat(expected)
    assert greedy.equals(alone[alone["sample"] == 0].reset_index(drop=True))
    assert found["prompt"].tolist() == alone["prompt"].tolist()
    rows = [4 * lengths.count(length) for length in sorted({*lengths})]
    assert told == [(sum(rows[: i + 1]), 24) for i in range(len(rows))]
    assert max(shape[0] for shape in read) == max(rows)


def test_of_long_texts_fewer_are_written_at_once(tiny_llama, monkeypatch):
    sizes = []

    def batches(function, rows, size, tell):
        sizes.append(size)
        return map_batches(function, rows, size, tell)

    monkeypatch.setattr("tl_melbo.generation.map_batches", batches)
    n_prompt = to_tokens(tiny_llama, PROMPT).shape[1]
    # Of six layers, two heads of eight keys and as many values, in float32.
    a_text = 6 * 2 * 8 * 2 * 4 * (n_prompt + 2)
    if not hasattr(tiny_llama, "original_model"):
        a_text += 4 * n_prompt * tiny_llama.cfg.d_vocab
    for free, size in ((2**40, 128), (4 * 5 * a_text, 5), (a_text, 1)):
        monkeypatch.setattr("tl_melbo.generation.free_memory", lambda _, free=free: free)
        tm.generate(tiny_llama, PROMPT, two_vectors(), layer=2, max_new_tokens=2)
        assert sizes.pop() == size


def test_unsteered_samples(tiny_llama):
    frame = tm.generate(tiny_llama, PROMPT, n_samples=4, max_new_tokens=5)
    assert frame["vector"].tolist() == [-1] * 5
    assert frame["scale"].tolist() == [0.0] * 5
    assert frame["completion"].nunique() > 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_samples": 0}, "n_samples=0: at least 1"),
        ({"n_samples": 2, "temperature": 0.0}, "temperature=0 with n_samples=2"),
        ({"temperature": float("inf")}, "temperature=inf"),
    ],
)
def test_sampling_that_cannot_be_is_named(tiny_llama, arguments, message):
    with pytest.raises(ValueError, match=message):
        tm.generate(tiny_llama, PROMPT, max_new_tokens=2, **arguments)


def test_samples_and_scales_of_a_library(tiny_llama):
    found = tm.SteeringVectors(two_vectors())
    told = []
    options = {"layer": 2, "max_new_tokens": 5, "chat": False}
    frame = collect_completions(
        tiny_llama, [PROMPT, "Hi!"], found, scales=(-2, 0, 1, 2), n_samples=3, batch_size=5,
        on_batch=lambda *counts: told.append(counts), **options,
    )  # fmt: skip
    rows = frame[frame["prompt"] == PROMPT]
    per_scale = [(-1, 0.0, 4), *((v, s, n) for v in (0, 1) for s, n in PER_SCALE)]
    counts = rows.groupby(["vector", "scale"], sort=False).size()
    assert [(*place, n) for place, n in counts.items()] == per_scale
    assert told[-1] == (len(frame), len(frame)) == (48, 48)
    assert [there for there, _ in told] == sorted({there for there, _ in told})
    # Each text is what `generate` alone writes there: vectors, samples and batches are independent.
    drawn = tm.generate(tiny_llama, [PROMPT], found, n_samples=3, scales=[1, -1], **options)
    keys = ["vector", "scale", "sample"]
    ours = rows.set_index(keys)["completion"]
    assert drawn.set_index(keys)["completion"].equals(
        ours.loc[pd.MultiIndex.from_frame(drawn[keys])]
    )


def test_a_temperature_without_samples_is_an_error(tiny_llama):
    found = tm.SteeringVectors(two_vectors())
    with pytest.raises(ValueError, match=r"temperature=0\.5: of samples; pass n_samples"):
        collect_completions(tiny_llama, PROMPT, found, layer=2, temperature=0.5)
