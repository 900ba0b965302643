"""Gated factors: against hooks by hand, finite differences, constant gates, a slow search."""

import json
import math

import pytest
import torch
from safetensors.torch import save_file

import tl_melbo as tm
from tests.reference import gated as slow
from tests.tiny_models import D_MODEL, N_LAYERS, tiny_bridge
from tl_melbo.errors import Damaged, NotFinite
from tl_melbo.gated._search import GatedMap
from tl_melbo.model.tokens import to_tokens

PROMPTS = ["Once upon a time", "Hello there, my friend, how"]
PROMPT = PROMPTS[0]
QUICK = {"layers": [0, 1], "target_layer": 3, "steps": 3}


def random_factors(n=1, layers=(0, 1), seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(n, len(layers), D_MODEL, generator=generator)
    B = torch.randn(n, len(layers), D_MODEL, generator=generator)
    return tm.GatedFactors.from_tensor(A, B, layers, **options)


@pytest.fixture(scope="module")
def model():
    return tiny_bridge("llama")


@pytest.fixture(scope="module")
def found(model):
    return tm.gated_factors(model, PROMPTS, 4, **QUICK)


def flat_map(model, prompts, radius, layers=(0, 1), target=3):
    f = tm.ActivationMap._hooked_between(model, prompts, False, layers[0] - 1, target, None)
    return GatedMap(f, layers, radius)


def test_adds_what_hooks_by_hand_add(tiny, unchanged):
    unchanged(tiny)
    library = random_factors(2, radius=0.5)
    tokens = to_tokens(tiny, PROMPT)
    expected = []
    for A, B in zip(library.A, library.B, strict=True):
        made = slow.hooks(A, B, (0, 1), 0.5)
        with torch.no_grad():
            logits = tiny.run_with_hooks(tokens, fwd_hooks=made)
        expected.append(logits[0, -1].log_softmax(-1))
    expected = torch.stack(expected)
    with tm.steered(tiny, library), torch.no_grad():
        inside = tiny(tokens.expand(2, -1))[:, -1].log_softmax(-1)
    torch.testing.assert_close(inside, expected, rtol=1e-5, atol=1e-5)
    log_probs = tm.next_token_log_probs(tiny, PROMPT, library)
    torch.testing.assert_close(log_probs, expected, rtol=1e-4, atol=1e-4)
    doubled = tm.next_token_log_probs(tiny, PROMPT, random_factors(2, radius=0.25), scale=2)
    torch.testing.assert_close(doubled, expected, rtol=1e-4, atol=1e-4)
    hook = ("blocks.5.hook_resid_post", lambda h, hook: h)  # with which the model's modules run
    with tiny.hooks([hook]):
        hooked = tm.next_token_log_probs(tiny, PROMPT, library)
        texts = tm.generate(tiny, PROMPT, library, max_new_tokens=4)["completion"].tolist()
    torch.testing.assert_close(hooked, expected, rtol=1e-4, atol=1e-4)
    assert texts == tm.generate(tiny, PROMPT, library, max_new_tokens=4)["completion"].tolist()


def test_a_factor_of_zero_is_the_model_bit_for_bit(tiny):
    library = random_factors(2)
    zero = torch.zeros_like(library.A)
    plain = tm.next_token_log_probs(tiny, PROMPT)
    tokens = to_tokens(tiny, PROMPT).expand(2, -1)
    with torch.no_grad():
        expected = tiny(tokens)
    silent = [tm.GatedFactors(zero, library.B, story=library.story)]
    silent += [tm.GatedFactors(library.A, zero, story=library.story)]
    for off, scale in ((silent[0], 1.0), (silent[1], 1.0), (library, 0.0)):
        assert torch.equal(tm.next_token_log_probs(tiny, PROMPT, off, scale=scale)[[1]], plain)
        with tm.steered(tiny, off, scale=scale), torch.no_grad():
            assert torch.equal(tiny(tokens), expected)


def test_positions_and_nesting(model):
    factor, tokens = random_factors(), to_tokens(model, PROMPT)
    with torch.no_grad():
        plain = model(tokens)
        with tm.steered(model, factor, positions=slice(-1, None)):
            last = model(tokens)
        with tm.steered(model, factor, scale=0.25), tm.steered(model, factor, scale=0.75):
            nested = model(tokens)
        with tm.steered(model, factor):
            whole = model(tokens)
    assert torch.equal(last[:, :-1], plain[:, :-1])
    assert not torch.allclose(last[:, -1], plain[:, -1])
    torch.testing.assert_close(nested, whole, rtol=1e-4, atol=1e-4)


def test_effects_are_those_of_hooks_by_hand():
    model = tiny_bridge("gpt2", torch.float64)
    library, tokens = random_factors(3, (1, 2)), [to_tokens(model, prompt) for prompt in PROMPTS]
    gated = flat_map(model, PROMPTS, 0.7, (1, 2), 4)
    A, B = (part / part.norm(dim=-1, keepdim=True) for part in (library.A, library.B))
    theta = torch.cat([A, B], -1).flatten(1).double() / 2  # 2 blocks, 4 parts
    effects = gated.delta(theta, slice(-3, None))
    assert effects.shape == (3, 2, gated.mask.shape[1], D_MODEL)
    for factor in range(3):
        with torch.no_grad():
            parts = A[factor].double(), B[factor].double()
            expected = slow.mean_effect(model, tokens, *parts, (1, 2), 0.7, 4)
        torch.testing.assert_close(effects[factor].sum((0, 1)) / 6, expected, rtol=1e-6, atol=1e-8)


def test_gradients_are_those_of_finite_differences():
    model = tiny_bridge("gpt2", torch.float64)  # others round to float32 in their norms
    gated = flat_map(model, PROMPTS, 1.0)
    generator = torch.Generator().manual_seed(0)
    theta = torch.randn(2, gated.size, generator=generator, dtype=torch.float64) / 8
    towards = torch.randn(2, gated.size, generator=generator, dtype=torch.float64)

    def norms(theta):
        return gated.delta(theta, slice(-3, None)).sum((1, 2)).norm(dim=-1)

    theta.requires_grad_()
    (gradient,) = torch.autograd.grad(norms(theta).sum(), theta)
    with torch.no_grad():
        slope = (norms(theta + 1e-6 * towards) - norms(theta - 1e-6 * towards)) / 2e-6
    torch.testing.assert_close((gradient * towards).sum(-1), slope, rtol=1e-5, atol=1e-6)


def test_the_search_is_that_of_a_slow_and_obvious_implementation():
    model = tiny_bridge("gpt2", torch.float64)
    prompts, layers, n, radius = [PROMPT], [0, 1], 3, 0.8
    found = tm.gated_factors(
        model, prompts, n, layers=layers, target_layer=2, radius=radius, steps=2, seed=3
    )
    gated = flat_map(model, prompts, radius, layers, 2)
    tokens = [to_tokens(model, prompt) for prompt in prompts]
    drawn = torch.randn(n, gated.size, generator=torch.Generator().manual_seed(3)).double()
    rows = drawn.reshape(n, 2, -1)
    start = [slow.normed(row[:, :D_MODEL], row[:, D_MODEL:]) for row in rows]
    factors, effects, alpha, objectives = slow.search(
        model, tokens, start, layers, radius, 2, steps=2
    )
    order = alpha.argsort(descending=True)
    for place, number in enumerate(order):
        # (-a, -b) is the same factor.
        a, b = factors[number]
        signs = (found.A[place] * a).sum(-1, keepdim=True).sign()
        torch.testing.assert_close(found.A[place].double(), signs * a, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.B[place].double(), signs * b, rtol=1e-4, atol=1e-5)
    columns = found.columns
    torch.testing.assert_close(columns["importance"].double(), alpha[order], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        columns["mean_effect"].double(), effects[order], rtol=1e-4, atol=1e-5
    )
    expected = torch.tensor(objectives, dtype=torch.float64)
    torch.testing.assert_close(found.history.sum(0), expected, rtol=1e-6, atol=1e-8)


def test_the_search_beats_random_factors_of_the_same_norm(model, found):
    tokens = [to_tokens(model, prompt) for prompt in PROMPTS]
    torch.testing.assert_close(found.A.norm(dim=-1), torch.ones(4, 2))
    torch.testing.assert_close(found.B.norm(dim=-1), torch.ones(4, 2))

    @torch.no_grad()
    def effects(library):
        pairs = zip(library.A, library.B, strict=True)
        each = [slow.mean_effect(model, tokens, a, b, (0, 1), 1.0, 3).norm() for a, b in pairs]
        return torch.stack(each)

    theirs, random = effects(found), effects(found.random(seed=1))
    torch.testing.assert_close(theirs, found.columns["effect"], rtol=1e-3, atol=1e-4)
    assert theirs.min() > random.max()
    assert found.history[:, -1].sum() > 2 * found.history[:, 0].sum()


def test_the_same_arguments_give_the_same_factors(model, found):
    again = tm.gated_factors(model, PROMPTS, 4, **QUICK)
    assert torch.equal(again.A, found.A)
    assert torch.equal(again.B, found.B)
    options = {**QUICK, "steps": 1}
    one, other = (tm.gated_factors(model, PROMPT, 4, seed=seed, **options) for seed in (0, 1))
    assert not torch.allclose(one.A, other.A, atol=1e-2)
    apart = tm.gated_factors(model, PROMPT, 4, batch_size=2, **options)
    torch.testing.assert_close(apart.A, one.A, rtol=1e-3, atol=1e-3)


def test_the_search_leaves_the_model_and_the_global_random_state_alone(unchanged, monkeypatch):
    model = tiny_bridge("llama")
    unchanged(model)
    model.train()
    model(to_tokens(model, PROMPT))
    flags = [module.training for module in model.modules()]
    with torch.no_grad():  # a search makes its own gradients
        tm.gated_factors(model, PROMPT, 2, **{**QUICK, "steps": 1})
    assert flags == [module.training for module in model.modules()]
    model.eval()

    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(torch.autograd, "grad", stop)
    with pytest.raises(KeyboardInterrupt):
        tm.gated_factors(model, PROMPT, 2, **QUICK)


def test_vectors_do_what_constant_gates_do(tiny, tmp_path):
    z, model = [], tiny
    keep = ("blocks.1.attn.hook_z", lambda each, hook: z.append(each[0].flatten(1)))
    model.run_with_hooks(to_tokens(model, PROMPT), fwd_hooks=[keep])
    # a reads the same number from every token, so R times it and b is added everywhere.
    gates = torch.full((len(z[0]), 1), 1.5, dtype=torch.float64)
    a = torch.linalg.lstsq(z[0].double(), gates).solution.T.float()
    b = torch.randn(1, D_MODEL, generator=torch.Generator().manual_seed(0))
    plain = tm.GatedFactors.from_tensor(a[None], b[None], [1], radius=0.5)
    gates = torch.tensor([[1.5]])
    factor = tm.GatedFactors(plain.A, plain.B, story=plain.story, columns={"mean_gate": gates})
    vectors = factor.vectors()
    assert (vectors.layers, vectors.place) == ((1,), "attention")
    torch.testing.assert_close(vectors.vectors[0], 0.75 * b)
    torch.testing.assert_close(
        tm.next_token_log_probs(model, PROMPT, vectors),
        tm.next_token_log_probs(model, PROMPT, factor),
        rtol=1e-3, atol=1e-3,
    )  # fmt: skip
    tokens = to_tokens(model, PROMPT)
    with torch.no_grad():
        with tm.steered(model, vectors):
            steered = model(tokens)
        with tm.steered(model, factor):
            torch.testing.assert_close(steered, model(tokens), rtol=1e-3, atol=1e-3)
        after = tm.LayeredVectors.from_tensor(vectors.vectors, [1])
        with tm.steered(model, after):
            difference = (steered - model(tokens)).abs().max()
    # Where the MLP reads what the block reads, attention's output goes to the block's end as it is.
    if model.cfg.parallel_attn_mlp:
        assert difference < 1e-4
    else:
        assert difference > 0.1
    vectors.save(tmp_path / "v.safetensors")
    read = tm.LayeredVectors.load(tmp_path / "v.safetensors")
    assert (2 * read[0]).place == "attention"
    with pytest.raises(ValueError, match="added to what attention writes"):
        read.at(1)
    with pytest.raises(ValueError, match="place make no sense"):
        tm.LayeredVectors(read.vectors, story={**read.story, "place": "mlp"}).save(tmp_path / "w")


@torch.no_grad()
def sum_of_gates(model, tokens, A, B):
    z, made = [], slow.hooks(A, B, (0, 1), 1.0)

    def keep(each, hook):
        z.append(each[0].flatten(1))

    made += [(f"blocks.{layer}.attn.hook_z", keep) for layer in (0, 1)]
    model.run_with_hooks(tokens, fwd_hooks=made)
    return torch.stack([(each @ a).sum() for each, a in zip(z, A, strict=True)])


def test_mean_gates_are_measured_under_the_factor(model, found):
    total, count = torch.zeros(2), 0
    for prompt in PROMPTS:
        tokens = to_tokens(model, prompt)
        total += sum_of_gates(model, tokens, found.A[1], found.B[1])
        count += tokens.shape[1]
    expected = total / count
    assert (expected > 0).all()
    torch.testing.assert_close(found.columns["mean_gate"][1], expected, rtol=1e-4, atol=1e-5)
    vectors = found.vectors()
    torch.testing.assert_close(vectors.vectors[1], expected[:, None] * found.B[1])
    assert torch.equal(vectors.columns["mean_gate"], found.columns["mean_gate"])


def test_what_the_factors_tell(model, found):
    assert {"importance", "effect", "index"} == {*found.table()}
    assert found.history.shape == (4, 4)  # three steps, and one without the push
    importance = found.columns["importance"]
    assert torch.equal(importance, importance.sort(descending=True).values)
    story = found.story
    assert story["prompts"] == PROMPTS
    assert (story["layers"], story["target_layer"]) == ([0, 1], 3)
    assert story["hyperparameters"]["positions"] == [-3, None, None]
    assert story["measure"]["column"] == "importance"
    assert "source_layer" not in story
    default = tm.gated_factors(model, PROMPT, 1, steps=1).story
    assert (default["layers"], default["target_layer"]) == ([0, 1], 3)  # of six
    assert "GatedFactors(4 x 2 blocks, 0 to 1, R = 1" in repr(found)


def test_saved_and_loaded(found, tmp_path):
    path = tmp_path / "g.safetensors"
    found.save(path)
    read = tm.GatedFactors.load(path)
    for name in ("A", "B", "history"):
        assert torch.equal(getattr(read, name), getattr(found, name))
    assert dict(read.story) == dict(found.story)
    assert read.columns.keys() == found.columns.keys()
    assert read[[2, 0]].columns["index"].tolist() == [2, 0]
    assert torch.equal(read.vectors().vectors, found.vectors().vectors)
    with pytest.raises(ValueError, match=r"read it with GatedFactors\.load, not with Adapter"):
        tm.Adapter.load(path)
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(Damaged, match=r"g\.safetensors"):
        tm.GatedFactors.load(path)


@pytest.mark.parametrize(
    ("story", "shapes"),
    [
        ({"layers": [0]}, ((1, 1, 4), (2, 1, 4))),
        ({"layers": [0, 1]}, ((1, 1, 4), (1, 1, 4))),
        ({"layers": [0], "hyperparameters": {"radius": 0}}, ((1, 1, 4), (1, 1, 4))),
        ({}, ((1, 1, 4), (1, 1, 4))),
    ],
)
def test_files_that_make_no_sense_are_damaged(tmp_path, story, shapes):
    path = tmp_path / "g.safetensors"
    metadata = {"format": "tl_melbo.gated_factors", "format_version": "1"}
    tensors = {name: torch.ones(shape) for name, shape in zip("AB", shapes, strict=True)}
    save_file(tensors, path, metadata | {"story": json.dumps(story)})
    with pytest.raises(Damaged, match=r"g\.safetensors"):
        tm.GatedFactors.load(path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": [0, N_LAYERS]}, f"layers={N_LAYERS}: .* has {N_LAYERS} layers"),
        ({"layers": [1, 1]}, "each once"),
        ({"layers": []}, "each once"),
        ({"target_layer": 1}, "target_layer=1: .* the band ends at 1"),
        ({"target_layer": N_LAYERS}, f"target_layer={N_LAYERS}"),
        ({"layers": [N_LAYERS - 1], "target_layer": None}, f"target_layer={N_LAYERS}"),
        ({"n_factors": 0}, "n_factors=0: at least 1"),
        ({"steps": 0}, "steps=0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"seed": -1}, "seed=-1"),
        ({"radius": math.inf}, "radius"),
        ({"radius": 1e-12}, "radius: every vector of this norm changes nothing"),
        ({"positions": slice(200, None)}, "positions=.*: picks no token of prompt 0"),
        ({"prompts": []}, "prompts: none given"),
    ],
)
def test_bad_arguments_are_named(model, options, message):
    with pytest.raises(ValueError, match=message):
        tm.gated_factors(model, **{"prompts": PROMPTS, **QUICK, **options})


def test_factors_and_models_that_do_not_belong_together(model, found):
    narrow = tm.GatedFactors.from_tensor(torch.ones(1, 1, 8), torch.ones(1, 1, D_MODEL), [0])
    with pytest.raises(ValueError, match="factors: read 8 numbers"):
        tm.next_token_log_probs(model, PROMPT, narrow)
    with pytest.raises(ValueError, match=f"layer={N_LAYERS}"):
        tm.generate(model, PROMPT, random_factors(layers=(0, N_LAYERS)))
    with pytest.raises(ValueError, match="knows its layers"):
        tm.generate(model, PROMPT, found, layer=2)
    with pytest.raises(ValueError, match="mean_gate"):
        random_factors().vectors()
    with pytest.raises(TypeError, match="TransformerLens model"):
        tm.gated_factors(torch.nn.Linear(2, 2), PROMPT)


def test_effects_that_are_not_finite_are_told(model):
    # Only where factors run side by side: the unsteered pass is sound.
    broken = ("blocks.2.hook_resid_post", lambda h, hook: h * (math.nan if len(h) > 1 else 1.0))
    with model.hooks([broken]), pytest.raises(NotFinite, match=r"factors \[0, 1\]: .*not finite"):
        tm.gated_factors(model, PROMPT, 2, **QUICK)


@pytest.mark.boundary
def test_a_hooked_transformer_is_refused_by_name(hooked_and_bridge):
    hooked, _ = hooked_and_bridge
    with pytest.raises(ValueError, match="use a TransformerBridge"):
        tm.gated_factors(hooked, PROMPT, 1)
    with pytest.raises(ValueError, match="use a TransformerBridge"):
        tm.next_token_log_probs(hooked, PROMPT, random_factors())
