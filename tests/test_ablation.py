"""Ablation: what is left of a direction in the residual stream, and what is left as it was."""

import pytest
import torch

import tl_melbo as tm
from tests.tiny_models import TINY_ARCHITECTURES, tiny_bridge
from tl_melbo.model.bridge import residual_hook_name

PROMPT = "Tell me about yourself."


def with_residuals(model, tokens):
    """The logits, and the residual stream after each block, hooks of the caller included."""
    residuals = []
    handles = [
        model.hook_dict[residual_hook_name(layer)].register_forward_hook(
            lambda module, args, output: residuals.append(output)
        )
        for layer in range(int(model.cfg.n_layers))
    ]
    try:
        return model(tokens), residuals
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("architecture", TINY_ARCHITECTURES)
def test_nothing_is_left_of_a_span_after_any_block(architecture, unchanged):
    model = tiny_bridge(architecture)
    unchanged(model)
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(2, int(model.cfg.d_model), generator=generator)
    # The third lies in the span of the others.
    theta = torch.cat([vectors, vectors.sum(0, keepdim=True)])
    tokens = model.to_tokens(PROMPT)
    with torch.no_grad():
        before = model(tokens)
        with tm.ablated(model, theta):
            logits, residuals = with_residuals(model, tokens)
        after = model(tokens)
    assert torch.equal(before, after)
    assert not torch.allclose(before, logits, atol=1e-3)
    assert len(residuals) == int(model.cfg.n_layers)
    for residual in residuals:
        share = (residual @ theta.T).abs().max() / (residual.norm(dim=-1).max() * theta.norm())
        assert float(share) < 1e-6


def test_a_vector_counts_however_short_it_is(tiny_llama):
    rows = torch.randn(2, 32, generator=torch.Generator().manual_seed(2))
    rows = rows / rows.norm(dim=-1, keepdim=True)
    tokens = tiny_llama.to_tokens(PROMPT)
    with torch.no_grad():
        with tm.ablated(tiny_llama, rows):
            expected = tiny_llama(tokens)
        with tm.ablated(tiny_llama, rows * torch.tensor([[1.0], [1e-8]])):
            found = tiny_llama(tokens)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("architecture", TINY_ARCHITECTURES)
def test_what_the_embedding_writes_along_it_is_not_read(architecture):
    model = tiny_bridge(architecture)
    direction = torch.randn(32, generator=torch.Generator().manual_seed(3))
    tokens = model.to_tokens(PROMPT)

    def logits(addend):
        point = model.hook_dict["hook_embed"]
        handle = point.register_forward_hook(lambda module, args, output: output + addend)
        try:
            return model(tokens)
        finally:
            handle.remove()

    with torch.no_grad():
        plain, moved = logits(0.0), logits(3 * direction)
        with tm.ablated(model, direction):
            without, also_without = logits(0.0), logits(3 * direction)
    assert not torch.allclose(plain, moved, atol=1e-2)
    torch.testing.assert_close(also_without, without, rtol=1e-3, atol=1e-3)


def test_with_steering_at_one_layer_the_inner_context_comes_last(tiny_llama):
    theta = torch.randn(1, 32, generator=torch.Generator().manual_seed(4))
    unit, tokens = theta[0] / theta.norm(), tiny_llama.to_tokens(PROMPT)
    with torch.no_grad():
        with tm.ablated(tiny_llama, theta):
            alone, _ = with_residuals(tiny_llama, tokens)
        with tm.steered(tiny_llama, theta, 2), tm.ablated(tiny_llama, theta):
            inside, _ = with_residuals(tiny_llama, tokens)
        with tm.ablated(tiny_llama, theta), tm.steered(tiny_llama, theta, 2):
            around, residuals = with_residuals(tiny_llama, tokens)
    torch.testing.assert_close(inside, alone, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(around, alone, atol=1e-2)
    along = torch.stack(residuals)[:, 0] @ unit
    expected = torch.zeros_like(along)
    expected[2] = theta.norm()
    torch.testing.assert_close(along, expected, rtol=1e-4, atol=1e-4)


def test_a_direction_that_is_not_there_changes_nothing(tiny_llama):
    tokens = tiny_llama.to_tokens(PROMPT)
    direction = torch.randn(1, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), tm.ablated(tiny_llama, direction):
        once = tiny_llama(tokens)
        with tm.ablated(tiny_llama, 5 * direction):
            twice = tiny_llama(tokens)
    torch.testing.assert_close(once, twice, rtol=1e-5, atol=1e-5)


def test_the_hooks_go_after_an_exception(tiny_llama, unchanged):
    unchanged(tiny_llama)
    with pytest.raises(RuntimeError, match="inside"), tm.ablated(tiny_llama, torch.ones(32)):
        raise RuntimeError("inside")


def test_what_has_no_direction_is_refused(tiny_llama):
    with (
        pytest.raises(ValueError, match=r"vectors: vectors \[1\] .* no direction"),
        tm.ablated(tiny_llama, torch.stack([torch.ones(32), torch.zeros(32)])),
    ):
        pass
    with pytest.raises(ValueError, match="d_model=32"), tm.ablated(tiny_llama, torch.ones(31)):
        pass
