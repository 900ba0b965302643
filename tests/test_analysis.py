"""Cosine similarity and KL divergence against scipy's, on the same numbers."""

import numpy as np
import pytest
import scipy.stats
import torch
from scipy.spatial.distance import cdist

import tl_melbo as tm
from tests.conftest import PROMPT
from tl_melbo.analysis import cosine_similarity, kl_divergence, kl_from_log_probs


@pytest.fixture
def vectors() -> torch.Tensor:
    return torch.randn(5, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def library(vectors: torch.Tensor) -> tm.SteeringVectors:
    return tm.SteeringVectors.from_tensor(vectors, source_layer=1)


def test_cosines_are_scipys(vectors: torch.Tensor, library: tm.SteeringVectors) -> None:
    expected = 1 - cdist(vectors.double(), vectors.double(), "cosine")
    np.testing.assert_allclose(cosine_similarity(vectors), expected, atol=1e-7)
    torch.testing.assert_close(cosine_similarity(library), cosine_similarity(vectors))


def test_cosines_with_others(vectors: torch.Tensor) -> None:
    similarity = cosine_similarity(vectors, -3 * vectors[:2])
    assert similarity.shape == (5, 2)
    assert similarity[0, 0] == pytest.approx(-1)


def test_cosines_of_effects_flatten_each(vectors: torch.Tensor) -> None:
    effects = vectors.reshape(5, 2, 4, 4)
    torch.testing.assert_close(cosine_similarity(effects), cosine_similarity(vectors))


def test_cosines_survive_extreme_lengths() -> None:
    vectors = torch.tensor([[1e-30, 0.0], [1e30, 1e30]])
    assert cosine_similarity(vectors)[0, 1] == pytest.approx(2**-0.5)
    assert cosine_similarity(vectors).abs().max() <= 1


def test_a_zero_vector_has_no_cosine(vectors: torch.Tensor) -> None:
    vectors[3] = 0
    with pytest.raises(ValueError, match=r"\[3\] are zero"):
        cosine_similarity(vectors)


def test_widths_must_agree(vectors: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="other: 31 wide"):
        cosine_similarity(vectors, vectors[:, :31])


def test_kl_is_scipys(vectors: torch.Tensor) -> None:
    log_p, log_q = vectors.log_softmax(-1), vectors.flip(0).log_softmax(-1)
    expected = scipy.stats.entropy(log_p.double().exp(), log_q.double().exp(), axis=1)
    np.testing.assert_allclose(kl_from_log_probs(log_p, log_q), expected, rtol=1e-5, atol=1e-7)


def test_kl_with_impossible_tokens() -> None:
    log_p = torch.tensor([[0.0, -torch.inf], [0.5, 0.5]])
    log_p[1] = log_p[1].log()
    log_q = log_p.flip(0)
    assert kl_from_log_probs(log_p, log_q).tolist() == pytest.approx([np.log(2), np.inf])


def test_kl_refuses_logits(vectors: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="log_q: the probabilities of some rows do not sum to one"):
        kl_from_log_probs(vectors.log_softmax(-1), vectors)


@pytest.mark.everywhere
def test_kl_divergence_of_a_model_is_scipys(
    tiny_llama: torch.nn.Module, library: tm.SteeringVectors
) -> None:
    steered = tm.next_token_log_probs(tiny_llama, PROMPT, library).double().exp()
    unsteered = tm.next_token_log_probs(tiny_llama, PROMPT).double().exp()
    to = kl_divergence(tiny_llama, PROMPT, library, batch_size=2)
    back = kl_divergence(tiny_llama, PROMPT, library, direction="from_reference")
    expected = scipy.stats.entropy(steered, unsteered.expand_as(steered), axis=1)
    np.testing.assert_allclose(to, expected, rtol=1e-4)
    expected = scipy.stats.entropy(unsteered.expand_as(steered), steered, axis=1)
    np.testing.assert_allclose(back, expected, rtol=1e-4)
    assert not torch.allclose(to, back, rtol=1e-2)


@pytest.mark.everywhere
def test_kl_to_itself_is_zero(
    tiny_llama: torch.nn.Module, library: tm.SteeringVectors, unchanged
) -> None:
    unchanged(tiny_llama)
    divergence = kl_divergence(tiny_llama, PROMPT, library, reference=library[2])
    assert divergence[2] == pytest.approx(0, abs=1e-6)
    assert (divergence >= 0).all()
    assert divergence[0] > 1e-3


def test_kl_takes_one_reference(tiny_llama: torch.nn.Module, library: tm.SteeringVectors) -> None:
    with pytest.raises(ValueError, match="reference: 2 vectors, expected exactly one"):
        kl_divergence(tiny_llama, PROMPT, library, reference=library[:2])


def test_kl_of_a_bare_tensor_needs_its_layer(
    tiny_llama: torch.nn.Module, vectors: torch.Tensor, library: tm.SteeringVectors
) -> None:
    with pytest.raises(ValueError, match="layer"):
        kl_divergence(tiny_llama, PROMPT, vectors)
    same = kl_divergence(tiny_llama, PROMPT, vectors, layer=1)
    torch.testing.assert_close(same, kl_divergence(tiny_llama, PROMPT, library))
