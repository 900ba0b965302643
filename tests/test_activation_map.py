"""f against the whole model: hooks on every block, and nothing of ours in between."""

import copy
import dataclasses
import weakref

import pytest
import torch
from torch.overrides import TorchFunctionMode

import tl_melbo as tm
from tests.conftest import PROMPT, fingerprint
from tests.tiny_models import tiny_bridge, tiny_hf, tokenizer
from tl_melbo.fast_blocks import FastBlocks
from tl_melbo.model.tokens import to_tokens

pytestmark = pytest.mark.boundary

PROMPTS = ["Tell me about yourself.", "Hi!", "Write a short poem about ships and the sea.", "Bye."]


def whole_model(model, prompt, theta, source, target, chat=False):
    """resid(target) of the whole model with theta added to resid(source) by a hook."""
    kept = {}

    def add(resid, hook):
        return resid + theta

    def keep(resid, hook):
        kept["resid"] = resid

    model.run_with_hooks(
        to_tokens(model, prompt, chat),
        fwd_hooks=[
            (f"blocks.{source}.hook_resid_post", add),
            (f"blocks.{target}.hook_resid_post", keep),
        ],
    )
    return kept["resid"][0]


class HonestFloat64(TorchFunctionMode):
    """Hugging Face's norms and softmax go through float32; keep float64 tensors as they are."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        wide = args and isinstance(args[0], torch.Tensor) and args[0].dtype == torch.float64
        if wide and function is torch.Tensor.to and torch.float32 in args[1:]:
            return args[0]
        if wide and function is torch.Tensor.float:
            return args[0]
        if wide and kwargs.get("dtype") == torch.float32:
            kwargs["dtype"] = torch.float64
        return function(*args, **kwargs)


def relative_error(a, b):
    a, b = a.detach(), b.detach()
    return float((a - b).norm() / b.norm())


@pytest.mark.slow
def test_equals_the_whole_embedded_model(model, f):
    theta = torch.randn(3, 576, generator=torch.Generator().manual_seed(0)) * 0.5
    plain = whole_model(model, PROMPT, torch.zeros(576), 8, 16, chat=True).detach()
    assert relative_error(f(f.x)[0], plain) < 1e-5
    with torch.no_grad():
        delta = f.delta(theta)
    for i in range(3):
        steered = whole_model(model, PROMPT, theta[i], 8, 16, chat=True).detach()
        assert relative_error(f.y[0] + delta[i, 0], steered) < 1e-5
        # The first token's residual is a hundred times longer than any other: without it, too.
        assert relative_error(f.y[0, 1:] + delta[i, 0, 1:], steered[1:]) < 1e-5


@pytest.mark.everywhere
@pytest.mark.parametrize("layers", [(0, 1), (1, 3), (0, 5)])
def test_equals_the_whole_model_on_every_architecture(every_tiny, layers):
    source, target = layers
    f = tm.ActivationMap.from_prompts(every_tiny, PROMPTS, source, target)
    theta = torch.randn(2, f.d_model, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        delta = f.delta(theta)
    for row, prompt in enumerate(PROMPTS):
        own = f.mask[row]
        for i in range(2):
            expected = whole_model(every_tiny, prompt, theta[i], source, target).detach()
            assert relative_error((f.y[row] + delta[i, row])[own], expected) < 1e-5
        assert own.sum() == to_tokens(every_tiny, prompt).shape[1]
        assert (delta[:, row, ~own] == 0).all()


@pytest.mark.everywhere
def test_several_prompts_equal_each_alone(tiny):
    together = tm.ActivationMap.from_prompts(tiny, PROMPTS, 1, 4)
    theta = torch.randn(3, together.d_model, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        delta = together.delta(theta)
        for row, prompt in enumerate(PROMPTS):
            alone = tm.ActivationMap.from_prompts(tiny, prompt, 1, 4)
            assert (
                relative_error(delta[:, row, together.mask[row]], alone.delta(theta)[:, 0]) < 1e-5
            )
    # Left padding: the last token of every prompt is in the last position.
    assert together.mask[:, -1].all()


@pytest.mark.everywhere
def test_equals_a_padded_batch_through_the_whole_model(tiny_llama):
    """The model's own way with padding: left pads, a mask, and position ids."""
    f = tm.ActivationMap.from_prompts(tiny_llama, PROMPTS, 1, 4)
    rows = [to_tokens(tiny_llama, prompt)[0] for prompt in PROMPTS]
    longest = max(map(len, rows))
    tokens = torch.stack([torch.nn.functional.pad(r, (longest - len(r), 0), value=2) for r in rows])
    kept = {}

    def keep(resid, hook):
        kept["resid"] = resid

    with tiny_llama.hooks(fwd_hooks=[("blocks.4.hook_resid_post", keep)]), torch.no_grad():
        tiny_llama(tokens, attention_mask=f.mask.long())
    assert relative_error(f(f.x)[f.mask], kept["resid"][f.mask]) < 1e-5


@pytest.mark.everywhere
def test_gradient_matches_finite_differences_in_float64(every_tiny):
    model = tiny_bridge(every_tiny.cfg.model_name.removeprefix("tiny-"), torch.float64)
    generator = torch.Generator().manual_seed(3)
    with HonestFloat64():
        f = tm.ActivationMap.from_prompts(model, PROMPTS[:2], 1, 4)
        theta, heading = torch.randn(2, 2, f.d_model, dtype=torch.float64, generator=generator)
        weights = torch.randn(2, *f.x.shape, dtype=torch.float64, generator=generator)

        def weighted(theta):
            return (f.delta(theta) * weights).sum()

        leaf = theta.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(weighted(leaf), leaf)
        with torch.no_grad():
            rises = [
                weighted(theta + n * 1e-3 * heading) - weighted(theta - n * 1e-3 * heading)
                for n in (1, 2, 3)
            ]
    # Of sixth order: a step long enough that rounding, which differs by processor, is small.
    slope = (45 * rises[0] - 9 * rises[1] + rises[2]) / 60e-3
    assert float(((gradient * heading).sum() - slope).abs() / slope.abs()) < 1e-9


@pytest.mark.everywhere
def test_equals_the_whole_model_in_float64(tiny):
    model = tiny_bridge(tiny.cfg.model_name.removeprefix("tiny-"), torch.float64)
    f = tm.ActivationMap.from_prompts(model, PROMPT, 1, 4)
    theta = torch.randn(1, f.d_model, dtype=torch.float64)
    expected = whole_model(model, PROMPT, theta[0], 1, 4).detach()
    with torch.no_grad():
        assert relative_error(f.y[0] + f.delta(theta)[0, 0], expected) < 1e-9


@pytest.mark.everywhere
def test_batching_over_vectors_changes_nothing(tiny):
    prompts = PROMPTS[:3]
    whole = tm.ActivationMap.from_prompts(tiny, prompts, 1, 4, batch_size=7)
    split = tm.ActivationMap.from_prompts(tiny, prompts, 1, 4, batch_size=2)
    theta = torch.randn(7, whole.d_model, generator=torch.Generator().manual_seed(4))
    results = []
    for f in (whole, split):
        leaf = theta.clone().requires_grad_()
        delta = f.delta(leaf)
        (gradient,) = torch.autograd.grad(delta.square().sum(), leaf)
        with torch.no_grad():
            results.append((delta.detach(), gradient, f.delta(theta)))
    for a, b in zip(*results, strict=True):
        assert relative_error(a, b) < 1e-5


def test_positions_count_from_each_prompts_own_ends(tiny_llama):
    f = tm.ActivationMap.from_prompts(tiny_llama, PROMPTS, 1, 4)
    lengths = f.mask.sum(-1)
    last = f.position_mask(slice(-2, None))
    assert (last.sum(-1) == 2).all()
    assert last[:, -2:].all()
    first = f.position_mask(slice(0, 1))
    assert [int(i) for i in first.float().argmax(-1)] == [int(f.mask.shape[1] - n) for n in lengths]
    assert torch.equal(f.position_mask(slice(None)), f.mask)
    with pytest.raises(ValueError, match=r"picks no token of prompt 1 \('Hi!'"):
        f.position_mask(slice(5, None))


def test_user_hooks_between_the_layers_fire_and_outlive_us(tiny_llama, unchanged):
    unchanged(tiny_llama)
    tiny_llama.add_hook("blocks.3.hook_resid_post", lambda resid, hook: resid * 2)
    before = fingerprint(tiny_llama)
    try:
        f = tm.ActivationMap.from_prompts(tiny_llama, PROMPT, 1, 4)
        expected = whole_model(tiny_llama, PROMPT, torch.ones(f.d_model), 1, 4).detach()
        with torch.no_grad():
            assert relative_error(f.y[0] + f.delta(torch.ones(1, f.d_model))[0, 0], expected) < 1e-5
        assert fingerprint(tiny_llama) == before
    finally:
        tiny_llama.reset_hooks()


def test_leaves_the_model_alone_also_after_an_exception(every_tiny, unchanged):
    unchanged(every_tiny)
    f = tm.ActivationMap.from_prompts(every_tiny, PROMPTS, 1, 4)
    theta = torch.ones(2, f.d_model, requires_grad=True)
    f.delta(theta).sum().backward()
    assert all(p.grad is None for p in every_tiny.parameters())

    def fail(resid, hook):
        raise RuntimeError("a user's hook failed")

    with (
        every_tiny.hooks(fwd_hooks=[("blocks.3.hook_resid_post", fail)]),
        pytest.raises(RuntimeError, match="a user's hook failed"),
    ):
        f.delta(theta)
    with (
        every_tiny.hooks(fwd_hooks=[("blocks.3.hook_resid_post", fail)]),
        pytest.raises(RuntimeError, match="a user's hook failed"),
    ):
        tm.ActivationMap.from_prompts(every_tiny, PROMPT, 1, 4)


def test_dropout_is_off_and_training_mode_comes_back(unchanged):
    model = tiny_bridge("gpt2")
    model.train()
    unchanged(model)
    f = tm.ActivationMap.from_prompts(model, PROMPT, 1, 4)
    theta = torch.ones(1, f.d_model)
    with torch.no_grad():
        assert torch.equal(f.delta(theta), f.delta(theta))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"source_layer": 4, "target_layer": 2}, r"source_layer=4, target_layer=2: .* so allowed"),
        ({"source_layer": 4, "target_layer": 4}, r"0 <= source_layer < target_layer <= 5"),
        ({"source_layer": 8, "target_layer": 16}, r"6 layers.*try source_layer=2, target_layer=3"),
        ({"source_layer": -1, "target_layer": 3}, r"source_layer=-1"),
        ({"source_layer": 1, "target_layer": 4, "batch_size": 0}, r"batch_size=0"),
        (
            {"source_layer": 1, "target_layer": 4, "prompts": "  "},
            r"at least one visible character",
        ),
        ({"source_layer": 1, "target_layer": 4, "prompts": []}, r"prompts: none given"),
        ({"source_layer": 1, "target_layer": 4, "prompts": "word " * 200}, r"reads at most 256"),
    ],
)
def test_bad_arguments_are_named(tiny_llama, arguments, message, unchanged):
    unchanged(tiny_llama)
    with pytest.raises(ValueError, match=message):
        tm.ActivationMap.from_prompts(tiny_llama, **{"prompts": PROMPT, **arguments})


def test_wrong_shapes_are_named(tiny_llama):
    f = tm.ActivationMap.from_prompts(tiny_llama, PROMPT, 1, 4)
    with pytest.raises(ValueError, match=r"theta: 7 wide.*d_model=32"):
        f.delta(torch.zeros(1, 7))
    with pytest.raises(TypeError, match="theta"):
        f.delta(torch.zeros(32))
    with pytest.raises(ValueError, match=r"x: shape \(1, 3, 32\)"):
        f(torch.zeros(1, 3, 32))


def test_not_finite_activations_are_named():
    model = tiny_bridge("llama")
    with torch.no_grad():
        model.blocks[2].mlp.out.original_component.weight.fill_(float("inf"))
    with pytest.raises(ValueError, match=r"after layer 4 holds values that are not finite"):
        tm.ActivationMap.from_prompts(model, PROMPT, 1, 4)


def test_hooks_that_come_and_go_count_on_both_sides(tiny_llama):
    f = tm.ActivationMap.from_prompts(tiny_llama, PROMPT, 1, 4)
    theta = torch.ones(2, f.d_model)
    before = f.delta(theta)
    zero = torch.zeros(1, f.d_model)
    with tiny_llama.hooks(fwd_hooks=[("blocks.3.hook_resid_post", lambda r, hook: r * 2)]):
        assert (f.delta(zero) == 0).all()
        assert (f.delta(theta) - before).abs().max() > 0.1
    torch.testing.assert_close(f.delta(theta), before)


def test_hooked_transformer_equals_its_whole_model(hooked_and_bridge):
    hooked, bridge = hooked_and_bridge
    ours = [tm.ActivationMap.from_prompts(m, PROMPTS, 1, 4) for m in (hooked, bridge)]
    theta = torch.randn(2, 32, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        deltas = [f.delta(theta) for f in ours]
    for row, prompt in enumerate(PROMPTS):
        own = ours[0].mask[row]
        for i in range(2):
            expected = whole_model(hooked, prompt, theta[i], 1, 4).detach()
            assert relative_error((ours[0].y[row] + deltas[0][i, row])[own], expected) < 1e-5
    assert relative_error(deltas[0], deltas[1]) < 1e-4


def test_of_no_streams_it_gives_none(every_tiny):
    f = tm.ActivationMap.from_prompts(every_tiny, PROMPTS, 1, 4)
    assert f(f.x[None][:0]).shape == (0, *f.x.shape)


def test_other_values_are_named(tiny_llama):
    f = tm.ActivationMap.from_prompts(tiny_llama, PROMPT, 1, 4)
    with pytest.raises(ValueError, match=r"theta: vectors \[1\] hold values that are not finite"):
        f.delta(torch.stack([torch.ones(32), torch.full((32,), float("nan"))]))
    with pytest.raises(
        ValueError, match=r"x: .*torch.float64 on cpu; .*torch.float32 on cpu, as f.x"
    ):
        f(f.x.double())
    with pytest.raises(ValueError, match="a slice's step cannot be 0"):
        f.position_mask(slice(None, None, 0))
    assert f.delta(torch.zeros(0, 32)).shape == (0, *f.x.shape)


@pytest.mark.everywhere
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_types_work(dtype):
    narrow = tm.ActivationMap.from_prompts(tiny_bridge("llama", dtype), PROMPT, 1, 4)
    wide = tm.ActivationMap.from_prompts(tiny_bridge("llama"), PROMPT, 1, 4)
    theta = torch.ones(1, 32)
    delta = narrow.delta(theta)
    assert delta.dtype == torch.float32
    assert relative_error(delta, wide.delta(theta)) < 0.1
    assert tm.melbo(narrow, 2, 2.0, steps=3).objective.isfinite().all()


def hooked(f):
    """The same map through the model's own modules."""
    return dataclasses.replace(f, _shortcut=None)


PATHS = {"llama": "fast", "qwen2": "fast"}


def test_the_fastest_path_that_fits_is_taken(every_tiny):
    f = tm.ActivationMap.from_prompts(every_tiny, PROMPTS, 1, 4)
    architecture = every_tiny.cfg.model_name.removeprefix("tiny-")
    assert f.path == PATHS.get(architecture, "unhooked")
    assert f"{f.path} path" in repr(f)
    with every_tiny.hooks(fwd_hooks=[("blocks.3.hook_resid_post", lambda resid, hook: resid)]):
        assert f.path == "hooked"
        assert tm.ActivationMap.from_prompts(every_tiny, PROMPTS, 1, 4).path == "hooked"
    assert f.path != "hooked"
    with every_tiny.hooks(bwd_hooks=[("blocks.3.hook_resid_post", lambda gradient, hook: None)]):
        assert f.path == "hooked"


def test_a_deep_copy_of_a_map_watches_its_own_model(tiny_llama):
    f = tm.ActivationMap.from_prompts(tiny_llama, PROMPTS, 1, 4)
    copied = copy.deepcopy(f)
    before = f._watched.state(), copied._watched.state()
    with torch.no_grad():
        copied.model.original_model.model.layers[2].mlp.up_proj.weight.mul_(2.0)
    assert f._watched.state() == before[0]
    assert copied._watched.state() != before[1]


def doubled_in_place(layer):
    layer.weight.mul_(2.0)


def doubled_by_another_parameter(layer):
    layer.weight = torch.nn.Parameter(2 * layer.weight)


def doubled_by_another_module(layer):
    layer.register_module("unused", torch.nn.Identity())
    layer.weight.copy_(2 * layer.weight)


@pytest.mark.parametrize(
    "change", [doubled_in_place, doubled_by_another_parameter, doubled_by_another_module]
)
def test_changed_weights_are_noticed(change):
    model = tiny_bridge("llama")
    f = tm.ActivationMap.from_prompts(model, PROMPTS, 1, 4)
    theta = torch.ones(1, f.d_model)
    with torch.no_grad():
        change(model.blocks[3].mlp.out.original_component)
    assert f.path == "hooked"
    anew = tm.ActivationMap.from_prompts(model, PROMPTS, 1, 4)
    assert anew.path == "fast"
    assert relative_error(f(f.x), anew.y) < 1e-5
    assert relative_error(f.delta(theta), anew.delta(theta)) < 1e-5


def test_an_exchanged_module_is_noticed():
    model = tiny_bridge("llama")
    f = tm.ActivationMap.from_prompts(model, PROMPTS, 1, 4)
    model.blocks[3].mlp._modules["_original_component"].act_fn = torch.nn.ReLU()
    assert f.path == "hooked"


def test_hooks_that_libraries_leave_behind_do_not_count(tiny):
    f = tm.ActivationMap.from_prompts(tiny, PROMPTS, 1, 4)
    with torch.no_grad():
        tiny.original_model(to_tokens(tiny, PROMPT), output_hidden_states=True)
    assert f.path == PATHS.get(tiny.cfg.model_name.removeprefix("tiny-"), "unhooked")


def untrained(architecture, **changes):
    """A tiny bridge with random norms and biases, and large embeddings as trained models have."""
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import MistralConfig, MistralForCausalLM, Qwen3Config, Qwen3ForCausalLM

    hf_model = tiny_hf("qwen2" if architecture == "qwen2" else "llama")
    makers = {
        "qwen3": (Qwen3Config, Qwen3ForCausalLM),
        "mistral": (MistralConfig, MistralForCausalLM),
    }
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(1)
        if architecture in makers:
            config, cls = makers[architecture]
            settings = {
                name: getattr(hf_model.config, name)
                for name in (
                    "vocab_size", "initializer_range", "hidden_size", "intermediate_size",
                    "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
                    "max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id",
                )
            }  # fmt: skip
            hf_model = cls(config(**{**settings, **changes})).eval()
        for name, parameter in hf_model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(0.3 * torch.randn_like(parameter))
        hf_model.get_input_embeddings().weight.mul_(100.0)
    if architecture == "relu":
        for layer in hf_model.model.layers:
            layer.mlp.act_fn = torch.nn.ReLU()
    hf_model.config._attn_implementation = "eager"
    hf_model.config.architectures = [type(hf_model).__name__]
    return TransformerBridge.boot_transformers(
        architecture, hf_model=hf_model, tokenizer=tokenizer(), device="cpu", dtype=torch.float32
    )


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_norms_and_biases_are_folded_in(architecture):
    f = tm.ActivationMap.from_prompts(untrained(architecture), PROMPTS, 1, 4)
    assert f.path == "fast"
    theta = torch.randn(2, f.d_model, generator=torch.Generator().manual_seed(3)).requires_grad_()
    weights = torch.randn(2, *f.x.shape, generator=torch.Generator().manual_seed(4))
    for positions in (slice(None), slice(-3, None)):
        deltas = [way.delta(theta, positions) for way in (f, hooked(f))]
        gradients = [torch.autograd.grad((delta * weights).sum(), theta)[0] for delta in deltas]
        assert relative_error(*gradients) < 1e-5


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [("relu", {}), ("qwen3", {}), ("mistral", {"sliding_window": 4})],
)
def test_kin_that_computes_something_else_is_not_taken_for_llama(architecture, changes):
    model = untrained(architecture, **changes)
    assert tm.ActivationMap.from_prompts(model, PROMPTS, 1, 4).path == "unhooked"


def test_layers_of_another_class_are_left_alone():
    class Quantised(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x)

    model = tiny_bridge("llama")
    for block in model.blocks:
        part = block.mlp.out
        part._modules["_original_component"] = Quantised(part.original_component)
    assert tm.ActivationMap.from_prompts(model, PROMPT, 1, 4).path != "fast"


def test_a_path_that_computes_something_else_is_not_taken(monkeypatch):
    monkeypatch.setattr(FastBlocks, "forward", lambda self, x, *rest: x * 1.0001)
    assert tm.ActivationMap.from_prompts(tiny_bridge("llama"), PROMPT, 1, 4).path == "unhooked"


@pytest.mark.everywhere
@pytest.mark.parametrize("positions", [slice(None), slice(-3, None), slice(0, -1, 2)])
@pytest.mark.parametrize("n_vectors", [1, 3])
def test_paths_agree_in_values_and_gradients(every_tiny, positions, n_vectors):
    f = tm.ActivationMap.from_prompts(every_tiny, PROMPTS, 1, 4)
    generator = torch.Generator().manual_seed(5)
    theta = torch.randn(n_vectors, f.d_model, generator=generator).requires_grad_()
    weights = torch.randn(n_vectors, *f.x.shape, generator=generator)
    deltas = [way.delta(theta, positions) for way in (f, hooked(f))]
    gradients = [torch.autograd.grad((delta * weights).sum(), theta)[0] for delta in deltas]
    assert relative_error(*deltas) < 1e-5
    assert relative_error(*gradients) < 1e-5
    counted = f.position_mask(positions)[:, :, None]
    whole = f.delta(theta)
    assert relative_error(deltas[0], whole * counted) < 1e-6
    assert (deltas[0] == deltas[0] * counted).all()
    assert (f.delta(torch.zeros_like(theta)) == 0).all()


@pytest.mark.slow
def test_the_embedded_model_takes_the_fast_path(f):
    assert f.path == "fast"
    generator = torch.Generator().manual_seed(6)
    theta = torch.randn(2, 576, generator=generator).requires_grad_()
    # Away from the first token, whose residual is a hundred times longer than the others'.
    weights = torch.randn(2, *f.x.shape, generator=generator)
    for vectors in (theta[:1], theta):  # one vector's products are packed, two vectors' are not
        deltas = [way.delta(vectors, slice(1, None)) for way in (f, hooked(f))]
        gradients = [
            torch.autograd.grad((delta * weights[: len(vectors)]).sum(), theta)[0]
            for delta in deltas
        ]
        assert relative_error(*deltas) < 1e-5
        assert relative_error(*gradients) < 1e-5


@pytest.mark.everywhere
def test_the_fast_gradient_is_exact_in_float64(tiny):
    """Against finite differences is above; here it is the fast path that is tested there."""
    architecture = tiny.cfg.model_name.removeprefix("tiny-")
    model = tiny_bridge(architecture, torch.float64)
    with HonestFloat64():
        f = tm.ActivationMap.from_prompts(model, PROMPTS, 1, 4)
        assert f.path == PATHS.get(architecture, "unhooked")
        generator = torch.Generator().manual_seed(10)
        wide = {"dtype": torch.float64, "generator": generator}
        theta = torch.randn(2, f.d_model, **wide).requires_grad_()
        weights = torch.randn(2, *f.x.shape, **wide)
        gradients = [
            torch.autograd.grad((way.delta(theta, slice(-4, None)) * weights).sum(), theta)[0]
            for way in (f, hooked(f))
        ]
    assert relative_error(*gradients) < 1e-9


@pytest.mark.everywhere
def test_gradients_of_gradients_and_forward_gradients(tiny):
    f = tm.ActivationMap.from_prompts(tiny, PROMPTS[:2], 1, 4)
    generator = torch.Generator().manual_seed(7)
    theta, heading = torch.randn(2, 1, f.d_model, generator=generator)
    theta.requires_grad_()
    products = []
    for way in (f, hooked(f)):
        (gradient,) = torch.autograd.grad(way.delta(theta).square().sum(), theta, create_graph=True)
        products.append(torch.autograd.grad((gradient * heading).sum(), theta)[0])
    assert relative_error(*products) < 1e-4
    weights = torch.randn(1, *f.x.shape, generator=generator)
    (backward,) = torch.autograd.grad((f.delta(theta) * weights).sum(), theta)
    _, slope = torch.func.jvp(f.delta, (theta.detach(),), (heading,))
    assert float((slope * weights).sum()) == pytest.approx(float((backward * heading).sum()), 1e-4)


def test_the_same_graph_can_be_used_twice_and_sees_changed_input(tiny_llama):
    f = tm.ActivationMap.from_prompts(tiny_llama, PROMPT, 1, 4)
    theta = torch.ones(1, f.d_model, requires_grad=True)
    loss = f.delta(theta).square().sum()
    first, second = (torch.autograd.grad(loss, theta, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    x = (f.x * 1.0).requires_grad_()
    steered = x * 1.0
    y = f(steered)
    with torch.no_grad():
        steered.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.everywhere
def test_more_vectors_than_memory_are_recomputed(tiny_llama, monkeypatch):
    f = tm.ActivationMap.from_prompts(tiny_llama, PROMPT, 1, 4, batch_size=2)
    theta = torch.randn(5, f.d_model, generator=torch.Generator().manual_seed(8)).requires_grad_()
    run, calls, kept = FastBlocks.forward, [], []

    def counting(self, x, rotation, positions, keep):
        calls.append(keep is not None)
        y = run(self, x, rotation, positions, keep)
        kept.extend(weakref.ref(part.gate_up) for part in keep or ())
        return y

    monkeypatch.setattr(FastBlocks, "forward", counting)
    gradients = []
    for fits, forwards, held in ((100, [True] * 3, 9), (3, [False] * 3, 0)):
        monkeypatch.setattr(tm.ActivationMap, "_vectors_in_memory", lambda *_, fits=fits: fits)
        calls.clear()
        kept.clear()
        loss = f.delta(theta).square().sum()
        assert calls == forwards
        assert sum(part() is not None for part in kept) == held
        gradients.append(torch.autograd.grad(loss, theta)[0])
        assert len(calls) == 3 if held else 6
        assert not any(part() is not None for part in kept), "a graph outlives its gradient"
    assert relative_error(*gradients) < 1e-6


def test_two_maps_of_one_model_leave_it_and_each_other_alone():
    """Also where one of them fails in the middle of a block."""
    model = tiny_bridge("llama")
    first = tm.ActivationMap.from_prompts(model, "Hi there!", 1, 3)
    second = tm.ActivationMap.from_prompts(model, ["Bye.", "A longer one."], 2, 4)
    theta = torch.ones(2, 32)
    expected, before = second.delta(theta), fingerprint(model)

    def fail(*_):
        raise RuntimeError("in the middle")

    handle = model.blocks[3].register_forward_hook(fail)  # in both maps
    hooked = fingerprint(model)
    for f in (first, second):
        with pytest.raises(RuntimeError, match="in the middle"):
            f.delta(theta)
        assert fingerprint(model) == hooked
    handle.remove()
    assert fingerprint(model) == before
    assert torch.equal(second.delta(theta), expected)
    found = tm.melbo(first, 1, 2.0, steps=2)
    tm.melbo_ortho(second, torch.ones(32), 1, steps=3)
    assert fingerprint(model) == before
    assert torch.equal(tm.melbo(first, 1, 2.0, steps=2).vectors, found.vectors)
