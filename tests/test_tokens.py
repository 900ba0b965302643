"""Directions of tokens, held to the difference of the logits that the model itself gives."""

import pytest
import torch

import tl_melbo as tm
from tests.conftest import PROMPT, fingerprint
from tests.tiny_models import TINY_ARCHITECTURES, tiny_bridge, tokenizer

ONE, OTHER = " and", " do"


def number(text):
    (token,) = tokenizer()(text, add_special_tokens=False)["input_ids"]
    return token


def last_stream_scale_and_logits(model):
    """The final residual stream [pos, d_model], its norm's scale [pos, 1], the logits."""
    kept = {}
    hooks = [
        ("blocks.5.hook_resid_post", lambda value, hook: kept.update(stream=value.detach()[0])),
        ("ln_final.hook_scale", lambda value, hook: kept.update(scale=value.detach()[0])),
    ]
    with torch.no_grad():
        logits = model.run_with_hooks(model.to_tokens(PROMPT), fwd_hooks=hooks)
    return kept["stream"], kept["scale"], logits[0]


def with_another_norm(architecture):
    """Its final norm's weight is not one: a direction without it would be wrong."""
    model = tiny_bridge(architecture)
    weight = model.ln_final.original_component.weight
    with torch.no_grad():
        weight += 0.3 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    return model


@pytest.mark.boundary
@pytest.mark.parametrize("architecture", TINY_ARCHITECTURES)
def test_it_gives_the_difference_of_the_logits(architecture):
    model = with_another_norm(architecture)
    stream, scale, logits = last_stream_scale_and_logits(model)
    before = fingerprint(model)
    direction = tm.analysis.token_direction(model, ONE, OTHER)
    expected = logits[:, number(ONE)] - logits[:, number(OTHER)]
    torch.testing.assert_close(stream @ direction / scale[:, 0], expected, rtol=1e-4, atol=1e-4)
    alone = tm.analysis.token_direction(model, ONE)
    expected = logits[:, number(ONE)] - logits.mean(-1)
    torch.testing.assert_close(stream @ alone / scale[:, 0], expected, rtol=1e-4, atol=1e-4)
    assert fingerprint(model) == before
    torch.testing.assert_close(tm.analysis.token_direction(model, OTHER, ONE), -direction)


def test_it_is_the_same_where_the_weights_are_folded():
    model = with_another_norm("gpt2")
    direction = tm.analysis.token_direction(model, ONE, OTHER)
    model.enable_compatibility_mode()
    folded = tm.analysis.token_direction(model, ONE, OTHER)
    torch.testing.assert_close(folded, direction, rtol=1e-4, atol=1e-5)


@pytest.mark.boundary
def test_hooked_transformer_and_bridge_have_the_same_direction(hooked_and_bridge):
    hooked, bridge = (tm.analysis.token_direction(model, ONE, OTHER) for model in hooked_and_bridge)
    torch.testing.assert_close(hooked, bridge, rtol=1e-5, atol=1e-6)


def test_factors_are_ranked_by_how_far_they_move_the_output(tiny_llama):
    f = tm.ActivationMap.from_prompts(tiny_llama, PROMPT, 1, 4)
    found = tm.dct(f, 5, radius=2.0, steps=3)
    direction = tm.analysis.token_direction(tiny_llama, ONE, OTHER)
    along = [
        float(found.columns["effect"][i] * (found.columns["output"][i] @ direction))
        for i in tm.ranked(found, by=direction).columns["index"]
    ]
    assert along == sorted(along, reverse=True)


@pytest.mark.parametrize(
    ("token", "other", "message"),
    [
        (" helpfully", None, r"token=' helpfully': \d+ tokens, \['.*'\]; pass exactly one"),
        ("and yes", ONE, r"token='and yes': \d tokens"),
        (ONE, "do so", "other='do so': "),
        ("", None, r"token='': an empty text; pass exactly one token, such as ' Yes'"),
        (ONE, ONE, "other=' and': the same token as token=' and'"),
    ],
)
def test_what_is_not_one_token_is_told(tiny_llama, token, other, message):
    with pytest.raises(ValueError, match=message):
        tm.analysis.token_direction(tiny_llama, token, other)


def test_a_leading_space_is_suggested_where_it_helps(tiny_llama):
    for with_space in (" and", " is", " in", " do", " the", " of"):
        bare = with_space[1:]
        if len(tokenizer()(bare, add_special_tokens=False)["input_ids"]) > 1:
            with pytest.raises(ValueError, match=f"pass exactly one, such as '{with_space}'"):
                tm.analysis.token_direction(tiny_llama, bare)
            return
    pytest.fail("the tokenizer splits none of these without a space: take other words")
