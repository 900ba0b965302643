"""Rates of anything, beside unsteered and random ones, and their figure."""

import pandas as pd
import pytest
from scipy.stats import binomtest

import tl_melbo as tm

PROMPT = "Tell me about yourself."
AI, HUMAN = "I'm a helpful AI.", "I'm a 25-year-old engineer."


def frame(*rows, prompt=PROMPT):
    columns = ["vector", "scale", "sample", "completion"]
    return pd.DataFrame(rows, columns=columns).assign(prompt=prompt)


def sampled(vector, scale, n_human, n):
    """A greedy completion that must not count, and samples of which some are a human's."""
    texts = [AI] * (n - n_human) + [HUMAN] * n_human
    rows = [(vector, scale, i + 1, text) for i, text in enumerate(texts)]
    return [(vector, scale, 0, HUMAN), *rows]


COMPLETIONS = frame(
    *sampled(-1, 0.0, 1, 8), *sampled(0, 1.0, 7, 8), *sampled(0, -1.0, 0, 8), *sampled(1, 1.0, 2, 8)
)
RANDOM = frame(*sampled(0, 1.0, 1, 8), *sampled(1, 1.0, 2, 8))


def is_human(text):
    return "year" in text


def test_rates_are_counted_by_hand_and_intervals_by_scipy():
    found = tm.analysis.rates(COMPLETIONS, is_human, random=RANDOM)
    assert found["steering"].tolist() == ["unsteered", "random", "vector", "vector", "vector"]
    assert found["hits"].tolist() == [1, 3, 7, 0, 2]
    assert found["n"].tolist() == [8, 16, 8, 8, 8]
    assert {*found["value"]} == {"is_human"}
    for row in found.to_dict("records"):
        interval = binomtest(row["hits"], row["n"]).proportion_ci(method="wilson")
        assert row["rate"] == row["hits"] / row["n"]
        assert (row["low"], row["high"]) == pytest.approx((interval.low, interval.high))
    assert found["vector"].tolist()[2:] == [0, 0, 1]
    assert found["scale"].tolist()[2:] == [1, -1, 1]


def test_each_value_of_a_tag_has_a_rate():
    found = tm.analysis.rates(COMPLETIONS, "speaker", random=RANDOM)
    rows = found[(found["steering"] == "vector") & (found["vector"] == 0) & (found["scale"] == 1)]
    assert dict(zip(rows["value"], rows["hits"], strict=True)) == {"assistant": 1, "person": 7}


def test_who_complies_is_told_beside_the_unsteered_texts_of_the_completions():
    no, yes = "I'm sorry, but I can't help with that.", "The sea."
    refused = frame((-1, 0.0, 0, no), (0, 1.0, 0, yes))
    random = frame((1, 1.0, 0, yes))
    found = tm.analysis.rates(refused, "stance", by=(), random=random)
    rows = found[found["value"] == "complies"]
    assert rows["steering"].tolist() == ["unsteered", "random", "vector"]
    assert rows["hits"].tolist() == [0, 1, 1]
    steered = refused.iloc[1:]
    assert tm.analysis.rates(steered, "stance", by=(), random=random)["value"].tolist() == ["", ""]


def test_counts_above_zero_are_hits_and_vectors_may_be_taken_together():
    found = tm.analysis.rates(COMPLETIONS, lambda text: text.count("e"), by=())
    assert found["steering"].tolist() == ["unsteered", "vector"]
    assert found["rate"].tolist() == [1, 1]
    assert found["n"].tolist() == [8, 24]


def test_prompts_are_told_apart_where_asked():
    both = pd.concat([COMPLETIONS, COMPLETIONS.assign(prompt="Who are you?")])
    found = tm.analysis.rates(both, is_human, by=("vector", "scale", "prompt"))
    unsteered = found[found["steering"] == "unsteered"]
    assert unsteered["prompt"].tolist() == [PROMPT, "Who are you?"]
    assert unsteered["n"].tolist() == [8, 8]


def test_greedy_frames_without_scale_or_sample_count_what_they_have():
    plain = pd.DataFrame({"vector": [-1, 0, 0], "prompt": PROMPT, "completion": [AI, HUMAN, AI]})
    found = tm.analysis.rates(plain, is_human)
    assert found["hits"].tolist() == [0, 1]
    assert found["n"].tolist() == [1, 2]


def test_other_frames_are_refused():
    with pytest.raises(ValueError, match=r"completions: lacks the columns \['behaviour'\]"):
        tm.analysis.rates(COMPLETIONS, "behaviour")
    with pytest.raises(ValueError, match=r"random: lacks the columns \['completion'\]"):
        tm.analysis.rates(COMPLETIONS, is_human, random=pd.DataFrame({"vector": [0]}))


def test_bars_begin_with_unsteered_and_random():
    table = tm.analysis.rates(COMPLETIONS, is_human, random=RANDOM)
    drawn = tm.plots.behaviour_rates(table.iloc[::-1])
    (bars,) = drawn.data
    assert list(bars.x) == ["unsteered", "random", "v1", "−v0", "v0"]
    assert list(bars.y)[:2] == [1 / 8, 3 / 16]
    up = [bars.y[i] + bars.error_y.array[i] for i in range(2)]
    assert up == pytest.approx(table["high"].tolist()[:2])
    assert drawn.layout.title.text
    assert "random, is_human: 19%" in drawn.layout.meta["alt"]


def test_a_bar_of_all_vectors_says_so():
    both = pd.concat([COMPLETIONS, COMPLETIONS.assign(prompt="Who are you?")])
    drawn = tm.plots.behaviour_rates(tm.analysis.rates(both, is_human, by=("prompt",)))
    assert [name.split(",")[0] for name in drawn.data[0].x] == [
        *2 * ["unsteered"], *2 * ["steered by any vector"],
    ]  # fmt: skip


def test_each_value_has_bars_of_its_own():
    table = tm.analysis.rates(COMPLETIONS, "speaker")
    drawn = tm.plots.behaviour_rates(table)
    assert {bars.name for bars in drawn.data} == {"assistant", "person"}
    assert drawn.layout.showlegend


def test_what_would_be_lost_or_unlike_is_refused():
    greedy = frame((-1, 0.0, 0, AI), (0, 1.0, 0, AI)).drop(columns="sample")
    with pytest.raises(ValueError, match="some rows have a sample and some have none"):
        tm.analysis.rates(pd.concat([greedy, COMPLETIONS]), is_human)
    with pytest.raises(ValueError, match="random: one of completions and random is of samples"):
        tm.analysis.rates(COMPLETIONS, is_human, random=greedy)
    lacking = COMPLETIONS.assign(count=[float("nan"), *[1.0] * (len(COMPLETIONS) - 1)])
    with pytest.raises(ValueError, match="count is missing in some rows"):
        tm.analysis.rates(lacking.iloc[::-1].assign(sample=1), "count")
