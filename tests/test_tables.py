"""How a notebook shows results."""

import re

import numpy as np
import pandas as pd
import torch

import tl_melbo as tm
from tests.tiny_models import tiny_bridge
from tl_melbo.tables import Table


def words_of(page: str) -> str:
    return re.sub(r"<[^>]*>", " ", page)


def test_texts_are_whole_and_nothing_in_them_is_markup():
    text = "first line\nsecond <b>bold</b> \x1b[31m \u202e " + "long " * 40
    page = Table({"completion": [text], "norm": [1 / 3], "vector": [7]})._repr_html_()
    assert "<b>" not in page
    assert "&lt;b&gt;bold" in page
    assert "\x1b" not in page
    assert "[U+202E]" in page
    assert page.count("long ") == 40
    assert "white-space:pre-wrap" in page
    words = words_of(page).split()
    assert "0.3333" in words
    assert "7" in words


def test_names_and_labels_are_escaped_too():
    page = Table({"<i>": [1]}, index=["<u>"])._repr_html_()
    assert "<i>" not in page
    assert "<u>" not in page


def test_long_tables_and_texts_are_cut_and_say_so():
    page = Table({"i": range(1000)})._repr_html_()
    assert "… 940 more rows …" in page
    words = words_of(page).split()
    assert {"0", "29", "970", "999"} <= set(words)
    assert "500" not in words
    assert "[5,000 characters]" in Table({"t": ["x" * 5000]})._repr_html_()


def test_what_is_missing_is_a_dash():
    page = Table({"a": [np.nan], "b": [None], "c": pd.array([pd.NA], dtype="Int64")})._repr_html_()
    assert words_of(page).split().count("–") == 3
    assert "nan" not in page.lower()


def test_it_is_a_frame_and_stays_one():
    table = Table({"vector": [0, 1, 2], "completion": ["a", "b", "c"]})
    for part in (table[table["vector"] > 0], table.head(1), table.sort_values("vector")):
        assert isinstance(part, Table)
    assert pd.DataFrame(table).equals(
        pd.DataFrame({"vector": [0, 1, 2], "completion": list("abc")})
    )


def test_results_show_themselves():
    model = tiny_bridge("llama")
    f = tm.ActivationMap.from_prompts(model, "Hi there!", 1, 4)
    found = tm.melbo(f, 2, 2.0, steps=2)
    results = [
        found.table(),
        tm.generate(model, "Hi!", found, max_new_tokens=2),
        tm.analysis.transfer(model, found, ["Hi!"], max_new_tokens=2),
        tm.analysis.scale_sweep(model, "Hi!", found, (0.0, 1.0), max_new_tokens=2),
        tm.analysis.composition(model, f, found, found[0], (2,), max_new_tokens=2),
        tm.analysis.family(model, f, found, found[0], max_new_tokens=2),
        tm.analysis.presence(model, found, "Hi there, you!", "One and two.", n_frames=5),
        tm.analysis.presence_statistics(torch.randn(5, 32), torch.randn(5, 32), found, n_frames=5),
        tm.report.collect_completions(model, "Hi!", found, max_new_tokens=2),
    ]
    for result in results:
        assert isinstance(result, Table)
        assert result._repr_html_().startswith("<table>")
