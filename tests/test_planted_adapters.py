"""Linearity of adapters whose answer is planted: one direction, or two, of which the text picks."""

import re

import pytest
import torch

import tl_melbo as tm
from tests.tiny_models import D_MODEL, N_LAYERS, as_bridge, tiny_hf

# Components of the residual stream that no block writes to: 1, and the token's class, 1 or -1.
CONSTANT, CLASS = 0, 1
# Far longer than what the blocks write, so that the direction alone tells the next token.
LENGTH = 30.0
PROMPTS = ["Once upon a time", "I", "Tell me about yourself.", "The sea", "We", "Go on"]


def directions():
    found = torch.randn(D_MODEL, 2, generator=torch.Generator().manual_seed(0))
    found[[CONSTANT, CLASS]] = 0
    return torch.linalg.qr(found).Q.T


@pytest.fixture(scope="module")
def model():
    """Tokens that the first direction makes likelier than the second are of class 1."""
    plain, (one, other) = tiny_hf("llama"), directions()
    with torch.no_grad():
        plain.model.embed_tokens.weight[:, CONSTANT] = 1
        plain.model.embed_tokens.weight[:, CLASS] = (plain.lm_head.weight @ (one - other)).sign()
        for block in plain.model.layers:
            for module in (block.self_attn.o_proj, block.mlp.down_proj):
                module.weight[[CONSTANT, CLASS]] = 0
    return as_bridge(plain)


def single():
    """Adds the first direction, whatever the text."""
    A = torch.zeros(1, 1, D_MODEL, 2)
    A[:, :, CONSTANT] = 1
    B = directions()[[0, 0]][None, None]
    return tm.Adapter.from_tensor(A, B, range(N_LAYERS), length=LENGTH)


def double():
    """Adds the first direction at tokens of class 1, the second at those of class -1."""
    A = torch.zeros(1, 1, D_MODEL, 2)
    A[:, :, CONSTANT] = 1
    A[:, :, CLASS] = torch.tensor([1.0, -1.0])
    return tm.Adapter.from_tensor(A, directions()[None, None], range(N_LAYERS), length=LENGTH)


def judge(question):
    """The most frequent words of the second texts."""
    texts = re.findall(r"second text:\n(.*?)(?=\n\nPair |\n\nIn one)", question, re.DOTALL)
    words = re.findall(r"\w+", " ".join(texts).lower())
    return " ".join(sorted({*words}, key=lambda word: (-words.count(word), word))[:8]) or "none"


@pytest.fixture(scope="module")
def measured(model):
    """Of both adapters: its vectors, and what `linearity` gives."""
    found = []
    for adapter in (single(), double()):
        vectors = adapter.vectors(model, PROMPTS, "addition", max_new_tokens=4)
        options = {"n_batches": 3, "max_new_tokens": 4, "embedder": "words"}
        score = tm.evaluation.linearity(model, adapter, vectors, PROMPTS, judge=judge, **options)
        found.append((vectors, score))
    return found


def test_the_vectors_of_one_direction_are_the_adapter(model, measured):
    vectors, score = measured[0]
    expected = LENGTH * directions()[0].expand(1, N_LAYERS, -1)
    torch.testing.assert_close(vectors.vectors, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(vectors.columns["constant_share"], torch.ones(1, N_LAYERS))
    assert score.texts["adapter"].tolist() == score.texts["vectors"].tolist()
    assert not {*score.texts["adapter"]} & {*score.texts["unsteered"]}


def test_the_vectors_of_two_directions_are_neither(measured):
    vectors, score = measured[1]
    cosines = torch.nn.functional.normalize(vectors.vectors[0], dim=-1) @ directions().T
    # A token has one of them or the other, so the shares add up to 1.
    shares = cosines * vectors.norms[0][:, None] / LENGTH
    torch.testing.assert_close(shares.sum(-1), torch.ones(N_LAYERS), rtol=1e-5, atol=1e-5)
    assert (shares > 0.2).all()
    different = score.texts["adapter"] != score.texts["vectors"]
    assert different.mean() > 0.5
    # What the adapter writes depends on the prompt's class.
    assert score.texts["adapter"].nunique() > 1


def test_one_direction_scores_one_and_two_score_their_null(measured):
    scores = [score for _, score in measured]
    null = tm.evaluation.linearity_null(
        [score.of_adapter for score in scores], [score.of_vectors for score in scores], "words"
    )
    one, two = null.to_dict("records")
    assert scores[0].score > 0.95
    assert one["score"] > one["null_high"] + 0.2
    assert two["score"] < two["null_high"]
    assert two["score"] < one["score"] - 0.4
