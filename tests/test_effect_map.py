"""The map of effects, and the words that tell of a library."""

import pytest
import torch

import tl_melbo as tm
from tl_melbo import story


def test_effects_lie_in_the_plane_of_their_largest_variance() -> None:
    """Against the singular vectors of the centred, normalised effects."""
    effects = torch.randn(9, 2, 4, 5, generator=torch.Generator().manual_seed(0))
    effects[:, :, :2] = 0
    places, shares = tm.analysis.effect_plane(effects)
    units = torch.nn.functional.normalize(effects.flatten(1).double())
    u, s, _ = torch.linalg.svd(units - units.mean(0), full_matrices=False)
    expected = u[:, :2] * s[:2]
    torch.testing.assert_close(places.double().abs(), expected.abs(), atol=1e-6, rtol=1e-5)
    assert shares == pytest.approx((s[:2] ** 2 / (s**2).sum()).tolist())
    with pytest.raises(ValueError, match="effects"):
        tm.analysis.effect_plane(effects[:1])
    with pytest.raises(ValueError, match="zero or not finite"):
        tm.analysis.effect_plane(effects * torch.tensor([0.0, *8 * [1.0]])[:, None, None, None])


def test_the_map_of_effects_names_and_colours() -> None:
    names = ["<b>x", "≈ baseline", "<b>x", None]
    drawn = tm.plots.effect_map(torch.eye(4)[:, :2], ["0", "0-", "1", "2-"], names)
    assert [trace.name for trace in drawn.data] == ["&lt;b&gt;x", "≈ baseline", "not grouped"]
    assert list(drawn.data[0].x) == [1.0, 0.0]
    assert drawn.data[1].marker.symbol == ("circle-open",)
    assert drawn.data[1].marker.color == drawn.data[2].marker.color != drawn.data[0].marker.color
    with pytest.raises(ValueError, match="labels: 1 for 4 places"):
        tm.plots.effect_map(torch.eye(4)[:, :2], ["0"])


def test_words_a_reader_knows() -> None:
    chosen = {"optimiser": "ascent", "steps": 10}
    assert (
        story.method_of({"method": "melbo", "hyperparameters": chosen})
        == "MELBO, power iteration (10 gradients)"
    )
    assert story.method_of({"method": "mean_difference"}) == "Mean difference"
    for name, shown in (
        ("Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-0.5B"), ("/home/me/models/m.gguf", "m"),
        ("C:\\models\\tiny", "tiny"), ("./here/", "here"), ("", None),
    ):  # fmt: skip
        assert story.model_of({"model": name}) == shown
