"""Dose and response, pairs, mixtures: against counts by hand and judges of known answers."""

import math
import re

import numpy as np
import pandas as pd
import pytest
import scipy.optimize
import torch

import tl_melbo as tm
from tests.judge_server import running
from tl_melbo.errors import NoAnswer, Unanswered
from tl_melbo.evaluation._dose import _interval, number_in
from tl_melbo.evaluation._pairwise import letter

PROMPTS = ["Once upon a time", "Hi!"]


def library(n_vectors=2, size=3.0, width=32):
    generator = torch.Generator().manual_seed(0)
    theta = size * torch.nn.functional.normalize(torch.randn(n_vectors, width, generator=generator))
    return tm.SteeringVectors.from_tensor(theta, source_layer=2)


def vowels(text):
    return len(re.findall("[aeiou]", text))


@pytest.fixture(scope="module")
def response(tiny_llama):
    return tm.evaluation.dose_response(
        tiny_llama,
        PROMPTS,
        library(),
        [-1.0, 1.0, 2.0],
        count=vowels,
        n_samples=3,
        max_new_tokens=5,
    )


def test_counts_are_those_of_the_texts(tiny_llama, response):
    table, texts = response.table, response.texts
    # Two vectors and their two controls at three scales, and the unsteered model.
    assert len(table) == 2 * 2 * 3 + 1
    options = {"n_samples": 3, "temperature": 0.7, "max_new_tokens": 5}
    written = tm.generate(tiny_llama, PROMPTS, library(), scales=[-1.0, 1.0, 2.0], **options)
    for row in table[table["steering"] == "vector"].to_dict("records"):
        own = written[(written["vector"] == row["vector"]) & (written["scale"] == row["scale"])]
        counts = [vowels(text) for text in own["completion"][own["sample"] > 0]]
        assert row["n"] == len(counts) == 6
        assert row["mean"] == pytest.approx(np.mean(counts))
        assert row["low"] <= row["mean"] <= row["high"]
        assert row["greedy"] == pytest.approx(
            np.mean([vowels(text) for text in own["completion"][own["sample"] == 0]])
        )
    (unsteered,) = table[table["steering"] == "unsteered"].to_dict("records")
    assert (unsteered["vector"], unsteered["scale"], unsteered["n"]) == (-1, 0.0, 6)
    random = table[table["steering"] == "random"]
    assert random["vector"].tolist() == [0, 0, 0, 1, 1, 1]
    assert set(random["n"]) == {2 * 6}
    assert set(texts["steering"]) == {"vector", "random", "unsteered"}


def test_a_scale_with_both_signs_has_an_odd_and_an_even_part(response):
    parts = response.negative_scale()
    assert parts["scale"].tolist() == [1.0, 1.0]
    means = response.table.set_index(["steering", "vector", "scale"])["mean"]
    zero = means["unsteered", -1, 0.0]
    for row in parts.to_dict("records"):
        up, down = (means["vector", row["vector"], scale] for scale in (1.0, -1.0))
        assert row["odd"] == pytest.approx((up - down) / 2)
        assert row["even"] == pytest.approx((up + down) / 2 - zero)
        assert row["odd_low"] <= row["odd"] <= row["odd_high"]
        assert row["even_low"] <= row["even"] <= row["even_high"]


def test_the_odd_part_needs_no_unsteered_count():
    signs = [("vector", 0, 1.0, 3.0), ("vector", 0, -1.0, 1.0), ("unsteered", -1, 0.0, math.nan)]
    texts = pd.DataFrame(signs, columns=["steering", "vector", "scale", "count"])
    texts = texts.assign(member=texts["vector"], prompt="x", sample=1)
    (row,) = tm.evaluation.DoseResponse(texts, texts).negative_scale().to_dict("records")
    assert (row["odd"], row["odd_low"], row["odd_high"]) == (1.0, 1.0, 1.0)
    assert math.isnan(row["even"])


def test_intervals_hold_what_they_say():
    """Poisson counts of four prompts with means of their own: nine of ten intervals hold theirs."""
    rng = np.random.default_rng(0)
    means, held = [1.0, 2.0, 5.0, 9.0], 0
    for _ in range(300):
        strata = [rng.poisson(mean, 8).astype(float) for mean in means]
        _, low, high = _interval(strata)
        held += low <= np.mean(means) <= high
    assert 0.88 < held / 300 < 0.98


def test_shares_get_wilsons_interval():
    strata = [np.array([0.0, 1.0, 0.0, 0.0]), np.array([0.0, 0.0, 1.0, 0.0])]
    assert _interval(strata) == (0.25, *tm.evaluation.wilson_interval(2, 8))


def test_the_window_ends_where_coherence_does():
    shares = {-2: 0.7, -1: 0.9, 1: 0.75, 2: 0.95}
    rows = [("unsteered", -1, 0.0, 1.0)]
    rows += [("vector", 4, float(scale), share) for scale, share in shares.items()]
    rows += [("random", 4, float(scale), 1.0) for scale in shares]
    table = pd.DataFrame(rows, columns=["steering", "vector", "scale", "coherent"])
    window = tm.evaluation.coherent_window(table)
    assert window.to_dict("records") == [{"vector": 4, "low": -1.0, "high": 0.0}]
    window = tm.evaluation.coherent_window(table, least=0.75)
    assert window.to_dict("records") == [{"vector": 4, "low": -1.0, "high": 2.0}]
    with pytest.raises(ValueError, match="0 unsteered rows, expected one"):
        tm.evaluation.coherent_window(table[1:])


def counting_judge(text):
    """A judge with a known answer: it counts vowels, as long as the text is not about a zebra."""
    text = text.split("The text:")[1]
    return "I cannot say." if "!" in text else f"There are {vowels(text)} of them."


def test_a_judge_may_count(tiny_llama, response):
    options = {"n_samples": 3, "max_new_tokens": 5, "n_random": 0, "question": "How many vowels?"}
    judged = tm.evaluation.dose_response(
        tiny_llama, PROMPTS, library(), [-1.0, 1.0, 2.0], count=counting_judge, **options
    )
    both = judged.texts.merge(
        response.texts, on=["steering", "vector", "scale", "sample", "prompt", "completion"]
    )
    known = both[both["count_x"].notna()]
    assert len(known)
    assert (known["count_x"] == known["count_y"]).all()
    asked = judged.texts["completion"].str.contains("!")
    assert (judged.texts["count"].isna() == asked).all()
    drawn = judged.texts[asked & (judged.texts["sample"] > 0)]
    assert judged.table["invalid"].sum() == len(drawn)
    with pytest.raises(NoAnswer, match="answers are not a number, the first is 'many'"):
        tm.evaluation.dose_response(
            tiny_llama, PROMPTS, library(), [1.0], count=lambda text: "many", **options
        )


@pytest.mark.parametrize(
    ("answer", "number"),
    [
        ("3", 3),
        ("**-2.5**", -2.5),
        ("There are 7 questions. So: 7", 7),
        ("3 or 4", None),
        ("", None),
        ("none", None),
        ("gpt4", None),
        ("9" * 400, None),
    ],
)
def test_numbers_are_read_from_answers(answer, number):
    assert number_in(answer) == number


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"scales": []}, ValueError, r"scales=\[\]: finite numbers other than 0"),
        ({"scales": [1.0, 1.0]}, ValueError, "each once"),
        ({"scales": [math.nan]}, ValueError, "finite numbers"),
        ({"count": "?"}, TypeError, "argument 'count' is '.'"),
        ({"count": lambda text: "3"}, TypeError, "count: gave the text '3'.*pass question="),
        ({"count": lambda text: None}, TypeError, "count: gave a NoneType"),
        ({"count": lambda text: math.inf}, ValueError, "count: gave inf"),
        ({"n_samples": 0}, ValueError, "n_samples=0"),
        ({"temperature": 0.0}, ValueError, "temperature=0.0"),
    ],
)
def test_bad_arguments_of_dose_response_are_named(tiny_llama, arguments, error, message):
    given = {"scales": [1.0], "count": len, "max_new_tokens": 1, "n_samples": 1, **arguments}
    with pytest.raises(error, match=message):
        tm.evaluation.dose_response(tiny_llama, "Hi!", library(), **given)


# Texts with a known order: more exclamation marks come first.
LOUD = ["Stop!!! Now!!", "Well! Fine! Yes!", "Oh! No!", "Hello!", "Good day."]


def louder(question):
    """A judge with a known answer, however the texts are put before it."""
    _, a, b = re.split(r"Text [AB]:\n", question.split("\n\nWhich of")[0])
    n, m = a.count("!"), b.count("!")
    return "T" if n == m else "A" if n > m else "B"


def ranking(judge):
    """Texts in the order of how many others they beat, by pairs of all."""
    pairs = [(i, j) for i in range(len(LOUD)) for j in range(i)]
    order = [3, 0, 4, 2, 1]
    texts = [LOUD[i] for i in order]
    ours, theirs = [texts[i] for i, _ in pairs], [texts[j] for _, j in pairs]
    compared = tm.evaluation.pairwise(judge, ours, theirs, "being loud")
    won = dict.fromkeys(texts, 0)
    for row in compared.pairs.to_dict("records"):
        assert row["verdict"] in ("ours", "theirs")
        won[row[row["verdict"]]] += 1
    return sorted(texts, key=won.get, reverse=True)


def test_all_judges_rank_what_is_known_alike(tmp_path, monkeypatch):
    pytest.importorskip("openai")
    with running() as server:
        server.answer = lambda text: f"Answer: {louder(text)}."
        behind = tm.judges.openai_compatible(server.url, "tiny", api_key_env=None)
        assert ranking(behind) == ranking(louder) == LOUD
    person = tm.judges.sheet(tmp_path / "sheet.csv")
    with pytest.raises(Unanswered, match="20 of 20 questions"):
        ranking(person)
    table = pd.read_csv(person.path, dtype=str, keep_default_na=False)
    table["answer"] = [louder(text).lower() for text in table["question"]]
    table.to_csv(person.path, index=False)
    assert ranking(person) == LOUD


def test_a_judge_that_always_says_a_is_caught():
    with pytest.warns(UserWarning, match=r"5 of 5 verdicts changed with the order.* A 10 times"):
        compared = tm.evaluation.pairwise(lambda text: "A", LOUD, LOUD[::-1], "being loud")
    (row,) = compared.table.to_dict("records")
    assert (row["n"], row["inconsistent"], row["consistent"], row["first"]) == (5, 5, 0.0, 1.0)
    assert math.isnan(row["share"])


def test_ties_and_invalid_answers_are_counted():
    def judge(question):
        return "It depends." if "Hello" in question else louder(question)

    ours, theirs = ["Hey!!", "Hey!", "Hello!", "Hey."], ["Hi!", "Hi!", "Hi!", "Hi!"]
    (row,) = tm.evaluation.pairwise(judge, ours, theirs, "being loud").table.to_dict("records")
    verdicts = [row[name] for name in ("ours", "theirs", "tie", "inconsistent", "invalid")]
    assert verdicts == [1, 1, 1, 0, 1]
    assert row["share"] == 0.5
    assert (row["low"], row["high"]) == tm.evaluation.wilson_interval(1, 2)
    assert (row["consistent"], row["first"]) == (1.0, 0.5)
    asked = []
    with pytest.raises(NoAnswer, match=r"8 of 8 answers are not one letter.*the first is ''"):
        tm.evaluation.pairwise(lambda text: asked.append(text) or "", ours, theirs, "being loud")
    assert len(asked) == 16
    assert all(text.endswith("one letter: A, B or T and nothing else.") for text in asked[8:])


def test_completions_are_compared_at_each_scale():
    columns = ["vector", "scale", "sample", "prompt", "completion"]
    rows = [
        (vector, scale, sample, prompt, "!" * int(2 + scale))
        for vector in (0, 1) for scale in (-2.0, 0.5, 1.0)
        for sample in (0, 1) for prompt in PROMPTS
    ]  # fmt: skip
    ours = pd.DataFrame(rows, columns=columns)
    rows = [(-1, 0.0, sample, prompt, "!!") for sample in (1, 0) for prompt in PROMPTS]
    theirs = pd.DataFrame(rows, columns=columns)
    seen = []
    compared = tm.evaluation.pairwise(
        lambda text: seen.append(text) or louder(text), ours, theirs, "being loud"
    )
    table = compared.table.set_index(["vector", "scale"])
    assert table.loc[(0, -2.0), ["n", "ours", "theirs", "tie"]].tolist() == [4, 0, 4, 0]
    assert table.loc[(1, 0.5), ["n", "ours", "theirs", "tie"]].tolist() == [4, 0, 0, 4]
    assert table.loc[(1, 1.0), "share"] == 1.0
    # Blind: nothing but the texts and the quality is in a question.
    assert len(seen) == 2 * len(ours)
    assert not any(prompt in text for text in seen for prompt in PROMPTS)
    with pytest.raises(ValueError, match="lacks a completion with the same"):
        tm.evaluation.pairwise(louder, ours, theirs[:2], "being loud")


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("A", "A"), ("b", "B"), ("(A)", "A"), ("**B**", "B"), ("Answer: A", "A"), ("T", "T"),
        ("The answer is B.", "B"), ("Text A.", "A"), ("A. It is happier.", "A"), ("Tie", "T"),
        ("It is a tie", None), ("A cat sat there.", None), ("Both are", None), ("", None),
        ("I think A", None), ("AB", None), ("B\n\nBecause", "B"),
    ],
)  # fmt: skip
def test_letters_are_read_from_answers(answer, expected):
    assert letter(answer) == expected


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"judge": None}, TypeError, "argument 'judge' is None"),
        ({"ours": []}, ValueError, "0 and 1 texts"),
        ({"theirs": "a"}, ValueError, "pass two lists"),
        ({"ours": pd.DataFrame()}, ValueError, "one is a frame and one is not"),
        ({"quality": " "}, ValueError, "quality=' '"),
    ],
)
def test_bad_arguments_of_pairwise_are_named(arguments, error, message):
    given = {"judge": louder, "ours": ["a"], "theirs": ["b"], "quality": "joy", **arguments}
    with pytest.raises(error, match=message):
        tm.evaluation.pairwise(**given)


def test_a_planted_mixture_is_found():
    parts = library(6, width=64)
    weights = torch.tensor([2.0, 0.0, -0.5, 0.0, 1.0, 0.0])
    vector = tm.SteeringVectors.from_tensor(weights @ parts.vectors, source_layer=2)
    found = tm.analysis.mixture(vector, parts)
    torch.testing.assert_close(found.coefficients, weights, atol=1e-5, rtol=0)
    assert found.explained == pytest.approx(1.0)
    assert found.p_value < 0.01
    # With both signs this is least squares: chance explains the share of the dimensions.
    assert float(found.null.mean()) == pytest.approx(6 / 64, abs=0.02)
    one_sided = tm.analysis.mixture(vector, parts, both_signs=False)
    expected, distance = scipy.optimize.nnls(
        parts.vectors.double().numpy().T, vector.vectors[0].double().numpy()
    )
    np.testing.assert_allclose(one_sided.coefficients, expected, atol=1e-5)
    norm = float(vector.norms[0])
    assert one_sided.explained == pytest.approx(1 - (distance / norm) ** 2, abs=1e-5)
    assert float(one_sided.rest.norm()) == pytest.approx(distance, rel=1e-4)
    assert one_sided.explained < found.explained


def test_a_random_vector_is_no_mixture():
    parts = library(6, width=64)
    other = torch.randn(64, generator=torch.Generator().manual_seed(9))
    assert tm.analysis.mixture(other, parts).p_value > 0.05


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"vector": torch.zeros(32)}, "vector: zero"),
        ({"vector": library(2)}, "vector: 2 vectors, expected exactly one"),
        ({"library": torch.zeros(2, 32)}, "library: vectors .* are zero"),
        ({"library": torch.ones(2, 8)}, "library: 8 wide"),
        ({"n_random": 0}, "n_random=0"),
        (
            {"library": tm.SteeringVectors.from_tensor(torch.ones(1, 32), source_layer=4)},
            "library: found at layer 4, but vector at layer 2",
        ),
    ],
)
def test_bad_arguments_of_mixture_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        tm.analysis.mixture(**{"vector": library(1), "library": library(2), **arguments})


def test_the_figures_show_the_tables(response):
    figure = tm.plots.dose_response(response.table, "vowels")
    assert [trace.name for trace in figure.data] == [
        "random, as long as 0", "random, as long as 1", "vector 0", "vector 1",
    ]  # fmt: skip
    own = response.table[response.table["vector"].isin([0, -1])]
    own = own[own["steering"] != "random"].sort_values("scale")
    assert list(figure.data[2].x) == [-1.0, 0.0, 1.0, 2.0]
    np.testing.assert_allclose(figure.data[2].y, own["mean"])
    np.testing.assert_allclose(figure.data[2].y + figure.data[2].error_y.array, own["high"])
    assert "vector 0" in figure.layout.meta["alt"]
    compared = tm.evaluation.pairwise(louder, LOUD[:2], LOUD[2:4], "being loud")
    figure = tm.plots.pairwise(compared.table, "being loud")
    assert [list(trace.y) for trace in figure.data] == [[1.0], [0.0]]
    assert "2 won, 0 lost, 0 undecided" in figure.layout.meta["alt"]
    with pytest.raises(ValueError, match="lacks the columns"):
        tm.plots.pairwise(response.table)
