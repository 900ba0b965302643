"""Linearity: the score against all matchings, and adapters whose answer is known."""

import random
import re

import pandas as pd
import pytest
import torch
from scipy import stats

import tl_melbo as tm
from tests.reference.assignment import best_matching
from tl_melbo.errors import NoAnswer

PROMPTS = [f"Tell me about {thing}." for thing in ("cats", "rain", "tea")] * 2


def points(texts):
    """A known embedding: six numbers a text, by a hash of it."""
    return [[random.Random(f"{text} {i}").gauss(0, 1) for i in range(6)] for text in texts]


@pytest.mark.parametrize("seed", range(5))
def test_the_score_is_that_of_the_best_of_all_matchings(seed):
    a, b = ([f"{seed} {side} {i}" for i in range(6)] for side in "ab")
    found = tm.evaluation.linearity_score(a, b, points)
    score, order = best_matching(points(a), points(b))
    assert found.score == pytest.approx(score, abs=1e-6)
    assert found.matched == list(order)
    partners = [float(found.matrix[i, j]) for i, j in enumerate(order)]
    interval = stats.t.interval(0.95, 5, score, stats.sem(partners))
    assert (found.low, found.high) == pytest.approx(interval, abs=1e-5)


def test_the_same_descriptions_in_another_order_score_one():
    texts = [f"text {i}" for i in range(6)]
    found = tm.evaluation.linearity_score(texts, texts[::-1], points)
    assert (found.score, found.low, found.high) == pytest.approx((1, 1, 1))
    assert found.matched == [5, 4, 3, 2, 1, 0]


def test_the_null_is_the_scores_between_adapters():
    # Adapters 0 and 1 are their vectors; adapter 2 is unlike anything.
    sets = [[f"{k} {i}" for i in range(3)] for k in range(4)]
    of_adapters, of_vectors = [*sets[:2], sets[2]], [*sets[:2], sets[3]]
    table = tm.evaluation.linearity_null(of_adapters, of_vectors, points)
    scores = table.attrs["scores"]
    for i in range(3):
        for j in range(3):
            expected, _ = best_matching(points(of_adapters[i]), points(of_vectors[j]))
            assert scores[i][j] == pytest.approx(expected, abs=1e-6)
    assert table["score"][:2].tolist() == pytest.approx([1, 1])
    null = [scores[0][1], scores[0][2], scores[1][0], scores[2][0]]
    row = table.to_dict("records")[0]
    assert row["null_mean"] == pytest.approx(sum(null) / 4)
    assert (row["null_low"], row["null_high"]) == pytest.approx((min(null), max(null)))
    for i, p_value in enumerate(table["p_value"]):
        null = [scores[i][j] for j in range(3) if j != i] + [
            scores[j][i] for j in range(3) if j != i
        ]
        assert p_value == pytest.approx((1 + sum(each >= scores[i][i] for each in null)) / 5)


def vector(seed, size=6.0):
    generator = torch.Generator().manual_seed(seed)
    theta = size * torch.nn.functional.normalize(torch.randn(1, 32, generator=generator))
    return tm.SteeringVectors.from_tensor(theta, source_layer=2)


def second_texts(question):
    return re.findall(r"second text:\n(.*?)(?=\nPair |\n\nPair |\n\nIn one)", question, re.DOTALL)


def frequent_words(question):
    """A judge with a known answer: the words of the second texts, the most frequent first."""
    words = re.findall(r"\w+", " ".join(second_texts(question)).lower())
    return " ".join(sorted({*words}, key=words.count, reverse=True)[:12])


def test_one_direction_scores_higher_than_another(tiny_llama, unchanged):
    unchanged(tiny_llama)
    options = {"judge": frequent_words, "n_batches": 3, "max_new_tokens": 8, "embedder": "words"}
    same = tm.evaluation.linearity(tiny_llama, vector(0), vector(0), PROMPTS, **options)
    other = tm.evaluation.linearity(tiny_llama, vector(0), vector(1), PROMPTS, **options)
    assert same.matrix.shape == (3, 3)
    assert same.score > other.score + 0.2
    # Both sides are described from batches of their own.
    assert same.of_adapter != same.of_vectors


def test_several_adapters_score_what_each_scores_alone(tiny_llama, monkeypatch):
    written, generate = [], tm.generate

    def spy(model, prompts, *args, **options):
        frame = generate(model, prompts, *args, **options)
        written.append(len(frame))
        return frame

    monkeypatch.setattr("tl_melbo.evaluation._linearity.generate", spy)
    sides = [tm.concatenate([vector(seed) for seed in seeds]) for seeds in ((0, 1), (0, 2))]
    options = {"judge": frequent_words, "n_batches": 3, "max_new_tokens": 4, "embedder": points}
    found = tm.evaluation.linearities(tiny_llama, *sides, PROMPTS, **options)
    assert sorted(written) == [6, 12, 12]  # unsteered once
    for number, each in enumerate(found):
        pair = (side[number] for side in sides)
        alone = tm.evaluation.linearity(tiny_llama, *pair, PROMPTS, **options)
        assert each.texts.equals(alone.texts)
        assert (each.of_adapter, each.of_vectors) == (alone.of_adapter, alone.of_vectors)
        assert (each.score, each.left_out) == (alone.score, alone.left_out)
    with pytest.raises(ValueError, match="adapters, vectors: 2 and 1"):
        tm.evaluation.linearities(tiny_llama, sides[0], vector(0), PROMPTS, **options)
    with pytest.raises(ValueError, match="both sides of adapter 0, but n_batches=7"):
        tm.evaluation.linearities(tiny_llama, *sides, PROMPTS, **{**options, "n_batches": 7})


def test_the_layer_is_that_of_vectors_which_do_not_know_theirs(tiny_llama):
    A, B = torch.randn(1, 1, 32, 2, generator=torch.Generator().manual_seed(0)), vector(1).vectors
    adapter = tm.Adapter.from_tensor(A, torch.stack([B, B], -2)[None], [1, 3])
    options = {"n_batches": 1, "max_new_tokens": 1, "embedder": points}
    options["judge"] = lambda text: "They differ."

    def texts(*sides, **layer):
        return tm.evaluation.linearity(tiny_llama, *sides, PROMPTS[:1], **options, **layer).texts

    told = texts(adapter, vector(1).vectors[0], layer=2)
    assert told.equals(texts(adapter, vector(1)))
    # A library keeps its own layer, too.
    other = texts(vector(0), B[0], layer=4)
    assert other["adapter"].equals(texts(vector(0), vector(1))["adapter"])


def test_both_sides_are_equally_long(tiny_llama):
    asked = []
    judge = lambda text: asked.append(text) or "They differ."  # noqa: E731
    found = tm.evaluation.linearity(
        tiny_llama,
        vector(0),
        vector(1),
        PROMPTS,
        judge=judge,
        n_batches=3,
        max_new_tokens=6,
        embedder=points,
    )
    raw = {
        side: tm.generate(tiny_llama, PROMPTS, vector(seed), max_new_tokens=6)["completion"]
        for seed, side in enumerate(("adapter", "vectors"))
    }
    kept = [i for i in range(len(PROMPTS)) if all(raw[side][i].strip() for side in raw)]
    for i, row in zip(kept, found.texts.to_dict("records"), strict=True):
        whole = [side for side in raw if row[side] == raw[side][i]]
        assert whole
        # The other one is cut, if at all: the last token may be part of a character.
        assert all(raw[side][i].startswith(row[side].rstrip("\ufffd")) for side in raw)
    assert len(found.texts) + found.left_out == len(PROMPTS)
    assert len(asked) == 6
    shown = [text.strip() for question in asked[:3] for text in second_texts(question)]
    assert sorted(shown) == sorted(text.strip() for text in found.texts["adapter"])
    assert found.score == pytest.approx(1)
    with pytest.raises(NoAnswer, match=r"descriptions \[0, 1, 2, 3, 4, 5\] of 6"):
        tm.evaluation.linearity(
            tiny_llama,
            vector(0),
            vector(1),
            PROMPTS,
            judge=lambda text: " ",
            n_batches=3,
            max_new_tokens=2,
        )


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"judge": 3}, TypeError, "argument 'judge' is 3"),
        ({"adapter": True}, TypeError, "argument 'adapter' is True"),
        ({"vectors": torch.tensor(1.0)}, TypeError, "argument 'vectors' is a tensor"),
        ({"prompts": PROMPTS[:2]}, ValueError, "2 of 2 have a text on both sides, but n_batches=6"),
        ({"n_batches": 0}, ValueError, "n_batches=0"),
        ({"vectors": torch.ones(2, 32), "layer": 2}, ValueError, "vectors: more than one"),
    ],
)
def test_bad_arguments_are_named(tiny_llama, arguments, error, message):
    given = {"adapter": vector(0), "vectors": vector(1), "prompts": PROMPTS, "max_new_tokens": 1}
    with pytest.raises(error, match=message):
        tm.evaluation.linearity(tiny_llama, **{**given, "judge": len, **arguments})


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [([], [], "0 and 0"), (["a"], ["b", "c"], "1 and 2"), ("a", "b", "lists")],
)
def test_descriptions_that_cannot_be_matched_are_named(a, b, message):
    with pytest.raises(ValueError, match=message):
        tm.evaluation.linearity_score(a, b, points)
    with pytest.raises(ValueError, match="at least two adapters"):
        tm.evaluation.linearity_null([["a"]], [["b"]], points)


def test_the_picture_frames_the_partners():
    found = tm.evaluation.linearity_score(["a", "b"], ["b", "a"], points)
    figure = tm.plots.description_heatmap(found)
    assert pd.DataFrame(figure.data[0].z).shape == (2, 2)
    centres = [((s.x0 + s.x1) / 2, (s.y0 + s.y1) / 2) for s in figure.layout.shapes]
    assert centres == [(1, 0), (0, 1)]
    assert "score 1.00" in figure.layout.meta["alt"]
