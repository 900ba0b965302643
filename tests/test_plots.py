"""What a figure holds: its numbers, its scales, what it says on its axes."""

import numpy as np
import pandas as pd
import pytest
import torch

import tl_melbo as tm
from tl_melbo.plots import cosine_heatmap, objective_history


def library(n_vectors: int, n_steps: int, **hyperparameters: str) -> tm.SteeringVectors:
    history = torch.arange(n_vectors * n_steps).reshape(n_vectors, n_steps).double()
    story = {"method": "melbo", "hyperparameters": hyperparameters}
    return tm.SteeringVectors(torch.ones(n_vectors, 4), story, {}, history)


def test_heatmap_shows_the_matrix_on_a_scale_centred_at_zero() -> None:
    similarity = torch.tensor([[1.0, -0.25], [-0.25, 1.0]])
    figure = cosine_heatmap(similarity, title="Vectors")
    (heatmap,) = figure.data
    np.testing.assert_array_equal(heatmap.z, similarity)
    assert (heatmap.zmin, heatmap.zmid, heatmap.zmax) == (-1, 0, 1)
    assert figure.layout.title.text == "Vectors"
    assert figure.layout.xaxis.title.text == figure.layout.yaxis.title.text == "vector"


def test_a_large_heatmap_is_no_heavier_than_its_numbers() -> None:
    n_vectors = 1500
    figure = cosine_heatmap(torch.eye(n_vectors))
    assert len(figure.to_json()) < 4 * n_vectors**2 * 4 / 3 + 50_000


def test_heatmap_of_a_library_is_that_of_its_cosines() -> None:
    theta = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 2.0]])
    found = tm.SteeringVectors.from_tensor(theta)
    expected = tm.analysis.cosine_similarity(found)
    torch.testing.assert_close(torch.tensor(cosine_heatmap(found).data[0].z), expected)
    assert cosine_heatmap(found).data[0].x is None
    assert list(cosine_heatmap(found[1:]).data[0].x) == ["1", "2"]


def test_heatmap_calls_vectors_by_their_labels() -> None:
    figure = cosine_heatmap(torch.eye(2), labels=[7, 3])
    assert figure.data[0].x == ("7", "3")
    with pytest.raises(ValueError, match="3 labels"):
        cosine_heatmap(torch.eye(2), labels=[1, 2, 3])


@pytest.mark.parametrize("value", [1.1, float("nan")])
def test_heatmap_refuses_what_is_no_cosine(value: float) -> None:
    with pytest.raises(ValueError, match="outside -1 to 1"):
        cosine_heatmap(torch.full((2, 2), value))


@pytest.mark.parametrize(
    ("optimiser", "first", "axis"), [("ascent", 1, "gradient evaluations"), ("adamw", 0, "step")]
)
def test_history_counts_what_the_optimiser_counts(optimiser: str, first: int, axis: str) -> None:
    figure = objective_history(library(3, 4, optimiser=optimiser))
    assert figure.layout.xaxis.title.text == axis
    assert figure.layout.yaxis.title.text == "objective (residual-stream units)"
    *lines, _ = figure.data
    assert [line.customdata[0] for line in lines] == [0, 1, 2]
    assert lines[1].x[0] == first
    np.testing.assert_array_equal(lines[1].y[:4], [4, 5, 6, 7])


def test_history_of_many_vectors_has_few_traces_and_every_number() -> None:
    found = library(1000, 3)
    figure = objective_history(found)
    assert len(figure.data) < 100
    drawn = np.concatenate([trace.y for trace in figure.data[:-1]])
    np.testing.assert_array_equal(drawn[~np.isnan(drawn)], found.history.flatten())


def test_history_of_a_slice_keeps_the_names_of_its_vectors() -> None:
    figure = objective_history(library(6, 3)[4:])
    assert [trace.customdata[0] for trace in figure.data[:-1]] == [4, 5]


def test_without_a_history_there_is_nothing_to_draw() -> None:
    with pytest.raises(ValueError, match="has no history"):
        objective_history(2.0 * library(3, 4))


def test_one_large_sum_does_not_flatten_the_others():
    kl = [1.0, 2.0, 3.0, 400.0]
    rows = {
        "size": [1, 2, 3, 4], "members": [(0,)] * 4, "subset": "first", "combination": "sum",
        "scaling": "raw", "norm": 1.0, "completion": "", "kl_to_reference": kl,
        "kl_to_unsteered": [1.0, 2.0, 3.0, 4.0], "distance": kl,
    }  # fmt: skip
    kinds = [
        tm.plots.composition_curves(pd.DataFrame(rows), measure).layout.yaxis.type
        for measure in ("kl_to_reference", "kl_to_unsteered")
    ]
    assert kinds == ["log", None]
