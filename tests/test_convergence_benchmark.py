"""What the convergence benchmark makes of its searches; the searches themselves are not tests."""

import math
from itertools import pairwise

import pandas as pd
import pytest
import torch

import tl_melbo as tm
from benchmarks.convergence import RULES, complete, stopping_on_gain, table


class Bent:
    """A map with a known gradient and a bend, so that a search climbs for many steps."""

    x = torch.zeros(1, 3, 8)
    mask = torch.ones(1, 3, dtype=torch.bool)
    d_model = 8
    matrix = torch.diag(torch.linspace(1.0, 1.4, 8))

    def delta(self, theta, positions=None):
        return ((theta @ self.matrix).tanh() * 3)[:, None, None, :].expand(-1, 1, 3, -1)

    def position_mask(self, positions):
        mask = torch.zeros(1, 3, dtype=torch.bool)
        mask[0, positions] = True
        return mask

    def vectors_at_once(self, with_gradient=True):
        return 4

    def story(self):
        return {"model": "bent", "source_layer": 0}


def climbed(row):
    """The values of a history in order, steps that were taken back left out."""
    return list(dict.fromkeys(value for value in row.tolist() if not math.isnan(value)))


@pytest.mark.parametrize("smallest", [0.05, 0.01])
def test_a_vector_ends_at_its_first_small_gain(smallest):
    with stopping_on_gain(smallest) as on_step:
        found = tm.melbo(Bent(), 4, 1.0, steps=40, on_step=on_step)
    whole = tm.melbo(Bent(), 4, 1.0, steps=40)
    # The first vector's way is the same up to there; later ones are orthogonal to another.
    first, to_the_end = climbed(found.history[0]), climbed(whole.history[0])
    assert first == to_the_end[: len(first)]
    assert len(first) < len(to_the_end)
    for row in found.history:
        values = climbed(row)
        gains = [after / before - 1 for before, after in pairwise(values)]
        assert all(gain >= smallest for gain in gains[:-1])
        assert gains[-1] < smallest


def test_the_search_is_as_it_was_afterwards():
    before = tm.melbo(Bent(), 2, 1.0, steps=20)
    with stopping_on_gain(0.5) as on_step:
        tm.melbo(Bent(), 2, 1.0, steps=20, on_step=on_step)
    torch.testing.assert_close(tm.melbo(Bent(), 2, 1.0, steps=20).vectors, before.vectors)


def cell(prompt, distinct, rules=RULES):
    return [
        {
            "model": "m", "prompt": prompt, "seed": 0, "rule": rule, "vectors": 16,
            "objective": 4.0 if rule == "40" else 2.0, "gradients": 160, "gaining over 5%": 8,
            "gaining over 1%": 16, "distinct": distinct + (rule == "5"), "coherent": 12,
            "hits 1": 1, "hits 2": 0,
        }
        for rule in rules
    ]  # fmt: skip


def test_the_table_holds_whole_cells_beside_ten_gradients():
    rows = pd.DataFrame([*cell("a", 3), *cell("b", 5), *cell("c", 90, RULES[:2])])
    lines = table(complete(rows)).set_index("rule")
    assert set(lines["searches"]) == {"2"}
    assert lines.loc["40", "objective / that of 10"] == "2.00"
    assert lines.loc["10", "distinct a search"] == "4.0 (3.0 to 5.0)"
    assert lines.loc["5", "minus those of 10"] == "1.0 (1.0 to 1.0)"
    assert lines.loc["10", "hits 1"].startswith("2 of 32 (")
