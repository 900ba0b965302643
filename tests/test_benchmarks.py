"""What the benchmarks make of their measurements; the measurements themselves are not tests."""

import pandas as pd
import pytest
from scipy.stats import binomtest

from benchmarks.adapters import by_rules
from benchmarks.backdoor import ratios, table
from benchmarks.cases import CELL, interval


def rows(method, seed, hits, seconds, n=100):
    return [
        {
            "method": method, "prompt": "Hi", "seed": seed, "seconds": seconds, "radius": 4.0,
            "behaviour": behaviour, "match": match, "hits": hit, "n": n,
        }
        for behaviour, hit in zip("ab", hits, strict=True)
        for match in ("exact", "similar")
    ]  # fmt: skip


def test_hits_a_second_are_compared_on_the_searches_that_both_did():
    measured = pd.DataFrame(
        [
            *rows("published", 0, (1, 1), 2000.0, n=10),
            *rows("ours", 0, (12, 8), 250.0),
            *rows("ours", 1, (90, 90), 1.0),  # published has no such search
            *rows("random", 0, (0, 0), 0.0),  # took no time: no rate
        ]
    )
    (line,) = ratios(measured)
    assert line.startswith("ours: 20 hits in 250 s, published 2 in 2000 s: 80 times")
    # The share of the hits that are ours lies in an exact interval much like the one told.
    low, high = (float(word) for word in line.replace("from ", "to ").split(" to ")[1:])
    exact = binomtest(20, 22).proportion_ci(0.95, method="exact")
    for told, share in ((low, exact.low), (high, exact.high)):
        assert told == pytest.approx(8 * share / (1 - share), rel=0.7)
    assert low < 80 < high


def test_no_hits_have_no_ratio_and_all_of_them_no_end():
    nothing = pd.DataFrame([*rows("published", 0, (0, 0), 10.0), *rows("ours", 0, (0, 0), 1.0)])
    assert ratios(nothing)[0].endswith("no ratio")
    ours = pd.DataFrame([*rows("published", 0, (0, 0), 10.0), *rows("ours", 0, (3, 0), 1.0)])
    assert "inf times" in ratios(ours)[0]
    assert ratios(pd.DataFrame(rows("ours", 0, (3, 0), 1.0))) == []


def test_the_table_adds_up_searches():
    measured = pd.DataFrame([*rows("ours", 0, (3, 0), 50.0), *rows("ours", 1, (1, 0), 150.0)])
    totals = table(measured).set_index(["behaviour", "match"])
    assert totals.loc[("a", "exact"), "hits"] == "4 of 200"
    assert totals.loc[("a", "exact"), "searches with a hit"] == "2 of 2"
    assert totals.loc[("b", "exact"), "searches with a hit"] == "0 of 2"
    assert totals.loc[("a", "exact"), "search s a vector"] == "1.00"


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (["It rains today.", "The sea is calm."], "They do not differ."),
        (["Is it? Rain, in May?", "Do gulls sing? Do they?"], "They ask questions more."),
        (
            ["I am it, my rain.", "I am my calm sea."],
            "They speak of themselves more, begin with i.",
        ),
        (["Today joy rains!", "The joy is calm!"], "They exclaim more, use the words joy."),
    ],
)
def test_the_judge_by_rules_says_what_has_changed(seconds, expected):
    firsts = ["It rains today.", "The sea is calm."]
    asked = "\n\n".join(
        f"Pair {n}, first text:\n{first}\nPair {n}, second text:\n{second}"
        for n, (first, second) in enumerate(zip(firsts, seconds, strict=True), start=1)
    )
    assert by_rules(f"Below are 2 pairs.\n\n{asked}\n\nIn one sentence, how?") == expected


def test_the_searches_of_a_prompt_are_drawn_together():
    """Of prompts that differ, and searches of each that are alike, prompts alone tell how sure."""
    cells = [("bundled", prompt, seed) for prompt in "abcd" for seed in range(25)]
    index = pd.MultiIndex.from_tuples(cells, names=CELL)
    values = pd.Series([float(ord(prompt) - ord("a")) for _, prompt, _ in cells], index)
    assert interval(values) == interval(values[::-1])
    told = interval(values)
    # 1.5 is the mean of 0, 1, 2, 3; of four that are drawn, the mean's deviation is 0.56.
    assert told.startswith("1.5 (")
    low, high = (float(word) for word in told[5:-1].split(" to "))
    assert (low, high) == (0.5, 2.5)
    alone = interval(values[:25])  # one prompt: nothing is known of others
    assert alone == "0.0 (0.0 to 0.0)"
