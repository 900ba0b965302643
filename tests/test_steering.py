"""Vectors in a model, against hooks set by hand and against text written without a cache."""

import math
from dataclasses import replace

import pytest
import torch

import tl_melbo as tm
from tests.conftest import fingerprint
from tests.tiny_models import tiny_bridge
from tl_melbo import generation
from tl_melbo.analysis import effect_distance
from tl_melbo.model.bridge import plain_model, without_bridge
from tl_melbo.model.tokens import to_tokens

pytestmark = pytest.mark.boundary

PROMPT = "Once upon a time"


def random_vectors(n_vectors, size=3.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return size * torch.nn.functional.normalize(torch.randn(n_vectors, 32, generator=generator))


def by_hand(model, tokens, layer, addend):
    """Logits with something added to the residual stream by an ordinary hook."""
    with torch.no_grad():
        return model.run_with_hooks(
            tokens, fwd_hooks=[(f"blocks.{layer}.hook_resid_post", lambda r, hook: r + addend)]
        )


@pytest.mark.everywhere
def test_adds_the_vector_at_every_position(every_tiny, unchanged):
    unchanged(every_tiny)
    tokens = to_tokens(every_tiny, PROMPT)
    theta = random_vectors(1)
    with tm.steered(every_tiny, theta, layer=2) as model, torch.no_grad():
        steered = model(tokens)
    torch.testing.assert_close(steered, by_hand(every_tiny, tokens, 2, theta))
    with torch.no_grad():
        assert not torch.allclose(steered, every_tiny(tokens), atol=1e-2)


@pytest.mark.everywhere
def test_nests_scales_and_takes_a_vector_for_each_row(tiny):
    tokens = to_tokens(tiny, PROMPT).expand(3, -1)
    one, three = random_vectors(1), random_vectors(3, seed=1)
    with (
        tm.steered(tiny, one[0], layer=2),
        tm.steered(tiny, three, layer=2, scale=-0.5),
        torch.no_grad(),
    ):
        steered = tiny(tokens)
    torch.testing.assert_close(steered, by_hand(tiny, tokens, 2, (one - 0.5 * three)[:, None]))


@pytest.mark.everywhere
@pytest.mark.parametrize(
    ("positions", "chosen"),
    [
        (slice(1, 3), [1, 2]),
        (slice(-2, None), [-2, -1]),
        ([0, -1], [0, -1]),
        (slice(None), None),
    ],
)
def test_steers_a_subset_of_positions(tiny, positions, chosen):
    tokens = to_tokens(tiny, PROMPT)
    theta = random_vectors(1)
    addend = torch.zeros(1, tokens.shape[1], 32)
    addend[:, slice(None) if chosen is None else chosen] = theta
    with tm.steered(tiny, theta, layer=2, positions=positions), torch.no_grad():
        steered = tiny(tokens)
    torch.testing.assert_close(steered, by_hand(tiny, tokens, 2, addend))


@pytest.mark.everywhere
@pytest.mark.parametrize(
    ("positions", "new_too"), [(slice(-2, None), True), (slice(0, 3), False), ([1], False)]
)
def test_positions_count_on_through_the_cache(tiny, positions, new_too):
    """Generation with a cache, one token a pass, against whole passes with hooks set by hand."""
    tokens = to_tokens(tiny, PROMPT)
    prompt_length = tokens.shape[1]
    theta = random_vectors(1)
    with tm.steered(tiny, theta, layer=2, positions=positions):
        ours = tiny.generate(
            tokens, max_new_tokens=6, do_sample=False, return_type="tokens", verbose=False,
            stop_at_eos=False,
        )  # fmt: skip
    for _ in range(6):
        addend = torch.zeros(1, tokens.shape[1], 32)
        addend[:, :prompt_length][:, positions] = theta
        if new_too:
            addend[:, prompt_length:] = theta
        logits = by_hand(tiny, tokens, 2, addend)[:, -1]
        tokens = torch.cat([tokens, logits.argmax(-1, keepdim=True)], 1)
    assert torch.equal(ours, tokens)


def test_the_model_comes_back_after_an_exception(tiny, unchanged):
    unchanged(tiny)
    tiny.add_hook("blocks.2.hook_resid_post", lambda resid, hook: resid)
    before = fingerprint(tiny)
    try:
        with pytest.raises(KeyError), tm.steered(tiny, random_vectors(1), layer=2):
            raise KeyError("inside")
        with (
            pytest.raises(ValueError, match="2 vectors, but a batch of 3"),
            tm.steered(tiny, random_vectors(2), layer=2),
        ):
            tiny(to_tokens(tiny, PROMPT).expand(3, -1))
        assert fingerprint(tiny) == before
    finally:
        tiny.reset_hooks()


def test_resetting_hooks_inside_does_not_break_the_exit(tiny_llama, unchanged):
    unchanged(tiny_llama)
    with tm.steered(tiny_llama, random_vectors(1), layer=2):
        tiny_llama.reset_hooks()


@pytest.mark.everywhere
def test_next_token_log_probs(tiny, unchanged):
    unchanged(tiny)
    theta = random_vectors(5)
    found = tm.SteeringVectors.from_tensor(theta, source_layer=2)
    log_probs = tm.next_token_log_probs(tiny, PROMPT, found, batch_size=2)
    assert log_probs.shape == (5, tiny.cfg.d_vocab)
    torch.testing.assert_close(log_probs.exp().sum(-1), torch.ones(5))
    tokens = to_tokens(tiny, PROMPT)
    for i in range(5):
        logits = by_hand(tiny, tokens, 2, theta[i])[0, -1]
        torch.testing.assert_close(log_probs[i], logits.log_softmax(-1))
    plain = tm.next_token_log_probs(tiny, PROMPT)
    with torch.no_grad():
        torch.testing.assert_close(plain, tiny(tokens)[:, -1].log_softmax(-1))


@pytest.mark.everywhere
def test_greedy_text_is_what_whole_passes_give(every_tiny, unchanged):
    """Each row its own vector and scale, with a cache, against one row at a time without."""
    unchanged(every_tiny)
    found = tm.SteeringVectors.from_tensor(random_vectors(3), source_layer=2)
    frame = tm.generate(
        every_tiny, PROMPT, found, scales=[1.0, -2.0], max_new_tokens=5, batch_size=4
    )
    assert frame.columns.tolist() == ["vector", "scale", "prompt", "completion"]
    assert frame["vector"].tolist() == [0, 1, 2] * 2
    assert frame["scale"].tolist() == [1.0] * 3 + [-2.0] * 3
    for row in frame.itertuples():
        tokens = to_tokens(every_tiny, PROMPT)
        start = tokens.shape[1]
        addend = row.scale * found.vectors[row.vector]
        for _ in range(5):
            new = by_hand(every_tiny, tokens, 2, addend)[:, -1].argmax(-1, keepdim=True)
            if int(new) == every_tiny.tokenizer.eos_token_id:
                break
            tokens = torch.cat([tokens, new], 1)
        expected = every_tiny.tokenizer.decode(tokens[0, start:], skip_special_tokens=True)
        assert row.completion == expected


def test_sampling_has_a_seed_of_its_own(tiny_llama):
    found = tm.SteeringVectors.from_tensor(random_vectors(2), source_layer=2)
    options = {"temperature": 1.0, "max_new_tokens": 8}
    first = tm.generate(tiny_llama, PROMPT, found, seed=1, **options)
    torch.rand(3)
    torch.manual_seed(0)
    state = torch.random.get_rng_state()
    again = tm.generate(tiny_llama, PROMPT, found, seed=1, **options)
    assert torch.equal(torch.random.get_rng_state(), state)
    other = tm.generate(tiny_llama, PROMPT, found, seed=2, **options)
    assert first.equals(again)
    assert not first.equals(other)


def test_unsteered_text_and_several_prompts(tiny_llama):
    frame = tm.generate(tiny_llama, [PROMPT, "Hi!"], max_new_tokens=4)
    assert frame["vector"].tolist() == [-1, -1]
    assert frame["prompt"].tolist() == [PROMPT, "Hi!"]
    zero = tm.generate(tiny_llama, PROMPT, torch.zeros(32), layer=2, max_new_tokens=4)
    assert zero["completion"][0] == frame["completion"][0]


def test_prompts_are_chat_if_the_vectors_were_found_so(tiny_llama):
    model = tiny_llama
    f = tm.ActivationMap.from_prompts(model, "Hi!", 1, 4, chat=True)
    found = tm.melbo(f, 1, 4.0, steps=1)
    as_found = tm.next_token_log_probs(model, "Hi!", found)
    assert torch.equal(as_found, tm.next_token_log_probs(model, "Hi!", found, chat=True))
    assert not torch.equal(as_found, tm.next_token_log_probs(model, "Hi!", found, chat=False))


@pytest.mark.slow
def test_a_found_vector_changes_the_text_and_leaves_no_trace(model, f, unchanged):
    unchanged(model)
    found = tm.melbo(f, 1, steps=4)
    plain = tm.generate(model, f.prompts[0], chat=True, max_new_tokens=12)["completion"][0]
    steered = tm.generate(model, f.prompts[0], found, max_new_tokens=12)["completion"][0]
    again = tm.generate(model, f.prompts[0], chat=True, max_new_tokens=12)["completion"][0]
    assert plain == again != steered


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"vectors": torch.ones(1, 31)}, r"vectors: 31 wide.*d_model=32"),
        ({"vectors": torch.full((32,), math.nan)}, r"not finite"),
        ({"layer": None}, r"layer: not given"),
        ({"layer": 6}, r"layer=6: tiny-llama has 6 layers, so allowed are 0 to 5"),
        ({"prompts": ""}, r"at least one visible character"),
        ({"prompts": []}, r"prompts: none given"),
        ({"scales": []}, r"scales=\[\]: one finite number, or several"),
        ({"scales": [math.inf]}, r"scales=\[inf\]"),
        ({"max_new_tokens": 0}, r"max_new_tokens=0"),
        ({"temperature": -1.0}, r"temperature=-1.0"),
        ({"batch_size": 0}, r"batch_size=0"),
    ],
)
def test_bad_arguments_are_named(tiny_llama, arguments, message, unchanged):
    unchanged(tiny_llama)
    with pytest.raises(ValueError, match=message):
        tm.generate(
            tiny_llama, **{"prompts": PROMPT, "vectors": torch.ones(32), "layer": 2, **arguments}
        )


def test_other_models_are_refused(tiny_llama):
    with pytest.raises(TypeError, match="expected a TransformerLens model"):
        tm.next_token_log_probs(tiny_llama.original_model, PROMPT)
    with (
        pytest.raises(TypeError, match="expected a TransformerLens model"),
        tm.steered(torch.nn.Linear(1, 1), torch.ones(32), layer=0),
    ):
        pass


def test_hooked_transformer_and_bridge_write_the_same(hooked_and_bridge):
    found = tm.SteeringVectors.from_tensor(random_vectors(3), source_layer=2)
    hooked, bridge = hooked_and_bridge
    torch.testing.assert_close(
        tm.next_token_log_probs(hooked, PROMPT, found),
        tm.next_token_log_probs(bridge, PROMPT, found),
        rtol=0, atol=1e-3,
    )  # fmt: skip
    options = {"scales": [1.0, -1.0], "max_new_tokens": 6}
    ours = [tm.generate(m, PROMPT, found, **options) for m in (hooked, bridge)]
    assert ours[0].equals(ours[1])


def test_model_on_meta_is_refused():
    model = tiny_bridge("llama").to("meta")
    with pytest.raises(ValueError, match="on the meta device"):
        tm.next_token_log_probs(model, PROMPT)


def test_samples_differ_between_prompts_rows_and_batches(tiny_llama):
    options = {"temperature": 1.0, "max_new_tokens": 8}
    prompts = tm.generate(tiny_llama, [PROMPT] * 3, **options)
    assert prompts["completion"].nunique() == 3
    rows = tm.generate(tiny_llama, PROMPT, torch.zeros(4, 32), layer=2, batch_size=2, **options)
    assert rows["completion"].nunique() == 4


def test_dropout_is_off_in_training_mode(unchanged):
    model = tiny_bridge("gpt2")
    model.train()
    unchanged(model)
    found = tm.SteeringVectors.from_tensor(random_vectors(2), source_layer=2)
    first = tm.next_token_log_probs(model, PROMPT, found)
    assert torch.equal(first, tm.next_token_log_probs(model, PROMPT, found))
    texts = [tm.generate(model, PROMPT, found, max_new_tokens=4) for _ in range(2)]
    assert texts[0].equals(texts[1])


def test_a_scale_that_overflows_is_named(tiny_llama):
    for call in (tm.next_token_log_probs, tm.generate):
        name = "scale" if call is tm.next_token_log_probs else "scales"
        with pytest.raises(ValueError, match=r"scale=1e\+39"):
            call(tiny_llama, PROMPT, random_vectors(1), layer=2, **{name: 1e39})


def test_no_vectors_and_no_room_are_named(tiny_llama):
    with pytest.raises(ValueError, match="vectors: none given"):
        tm.next_token_log_probs(tiny_llama, PROMPT, torch.zeros(0, 32), layer=2)
    with pytest.raises(ValueError, match=r"max_new_tokens=254: after a prompt of \d+ tokens"):
        tm.generate(tiny_llama, PROMPT, max_new_tokens=254)


@pytest.mark.parametrize(
    ("positions", "message"),
    [
        ([], "empty list"),
        ([100], "outside the prompt"),
        (slice(None, None, -1), "runs backwards"),
        (slice("a", None), "slice of integers"),
    ],
)
def test_positions_that_steer_nothing_are_named(tiny_llama, positions, message):
    with (
        pytest.raises(ValueError, match=message),
        tm.steered(tiny_llama, random_vectors(1), layer=2, positions=positions),
    ):
        tiny_llama(to_tokens(tiny_llama, PROMPT))


def test_text_ends_at_any_of_the_models_end_tokens(tiny_llama, monkeypatch):
    plain = tm.generate(tiny_llama, PROMPT, max_new_tokens=6)["completion"][0]
    tokens = to_tokens(tiny_llama, PROMPT)
    with torch.no_grad():
        first = int(tiny_llama(tokens)[0, -1].argmax())
    config = tiny_llama.original_model.generation_config
    monkeypatch.setattr(config, "eos_token_id", [511, first])
    assert plain
    assert tm.generate(tiny_llama, PROMPT, max_new_tokens=6)["completion"][0] == ""


def test_a_library_joined_with_a_tensor_stays_chat(tiny_llama):
    model = tiny_llama
    f = tm.ActivationMap.from_prompts(model, "Hi!", 1, 4, chat=True)
    found = tm.melbo(f, 1, 4.0, steps=1)
    joined = tm.concatenate([found, tm.SteeringVectors.from_tensor(torch.ones(32))])
    as_found = tm.next_token_log_probs(model, "Hi!", found)
    together = tm.next_token_log_probs(model, "Hi!", joined)[:1]
    # Another batch size rounds otherwise; raw prompts would differ by whole nats.
    torch.testing.assert_close(as_found, together, rtol=0, atol=1e-2)


def test_mixed_libraries_ask_whether_prompts_are_chat(tiny_llama):
    facts = {"model": "m", "source_layer": 2}
    parts = [
        tm.SteeringVectors(random_vectors(1), {"method": "melbo", "chat": chat, **facts})
        for chat in (True, False)
    ]
    both = tm.concatenate(parts)
    with pytest.raises(ValueError, match="pass chat=True or chat=False"):
        tm.next_token_log_probs(tiny_llama, PROMPT, both)
    assert len(tm.next_token_log_probs(tiny_llama, PROMPT, both, chat=False)) == 2


def texts_both_ways(model, monkeypatch, *arguments, **options):
    """What is written without the bridge, and through it."""
    fast = tm.generate(model, *arguments, **options)
    with monkeypatch.context() as patch:
        patch.setattr(generation, "plain_model", lambda _: None)
        return fast, tm.generate(model, *arguments, **options)


@pytest.mark.everywhere
def test_rows_that_end_early_leave_the_others_alone(tiny, monkeypatch):
    """With more and more tokens named as ends, rows end here and there."""
    vectors = random_vectors(12, size=6.0)
    tokens = to_tokens(tiny, PROMPT)
    written = []
    for theta in vectors:
        row = tokens
        for _ in range(12):
            new = by_hand(tiny, row, 2, theta)[:, -1].argmax(-1, keepdim=True)
            row = torch.cat([row, new], 1)
        written.append(row[0, tokens.shape[1] :].tolist())
    # Every text as it goes on without ends, cut at the first of some tokens that it comes to.
    ends = [written[0][2], written[3][5], written[6][8]]
    config = tiny.original_model.generation_config
    monkeypatch.setattr(config, "eos_token_id", ends)
    frame = tm.generate(tiny, PROMPT, vectors, layer=2, max_new_tokens=12)
    lengths = set()
    for row, completion in zip(written, frame["completion"], strict=True):
        stops = [i for i, token in enumerate(row) if token in (*ends, tiny.tokenizer.eos_token_id)]
        kept = row[: stops[0]] if stops else row
        lengths.add(len(kept))
        assert completion == tiny.tokenizer.decode(kept, skip_special_tokens=True)
    assert len(lengths) > 1


@pytest.mark.everywhere
def test_without_the_bridge_the_same_is_written(tiny, monkeypatch):
    assert plain_model(tiny) is not None
    fast, slow = texts_both_ways(
        tiny, monkeypatch, [PROMPT, "Hi!"], random_vectors(5), layer=5, max_new_tokens=9
    )
    assert fast.equals(slow)


def test_settings_that_a_model_brings_along_do_not_count(tiny_llama, monkeypatch):
    options = {"layer": 2, "max_new_tokens": 9}
    before = tm.generate(tiny_llama, PROMPT, random_vectors(3), **options)
    config = tiny_llama.original_model.generation_config
    for name, value in {"repetition_penalty": 2.0, "do_sample": True, "min_length": 20}.items():
        monkeypatch.setattr(config, name, value)
    assert all(text.equals(before) for text in texts_both_ways(
        tiny_llama, monkeypatch, PROMPT, random_vectors(3), **options
    ))  # fmt: skip


def test_hooks_fire_while_writing(tiny_llama):
    seen = []
    with tiny_llama.hooks(fwd_hooks=[("blocks.4.hook_resid_post", lambda r, hook: seen.append(1))]):
        hooked = tm.generate(tiny_llama, PROMPT, random_vectors(2), layer=2, max_new_tokens=4)
    assert seen
    assert hooked.equals(
        tm.generate(tiny_llama, PROMPT, random_vectors(2), layer=2, max_new_tokens=4)
    )
    with tm.steered(tiny_llama, random_vectors(1, size=9.0, seed=3), layer=3):
        more = tm.generate(tiny_llama, PROMPT, random_vectors(2), layer=2, max_new_tokens=4)
    assert not more.equals(hooked)


def test_a_bridge_that_computes_otherwise_computes_itself():
    model = tiny_bridge("llama")
    assert plain_model(model) is not None
    model.enable_compatibility_mode()
    assert plain_model(model) is None
    tokens = to_tokens(model, PROMPT)
    theta = random_vectors(1)
    log_probs = tm.next_token_log_probs(model, PROMPT, theta, layer=2)
    logits = by_hand(model, tokens, 2, theta)[:, -1]
    torch.testing.assert_close(log_probs, logits.log_softmax(-1))


def test_no_temperature_is_too_small(tiny_llama):
    options = {"layer": 2, "max_new_tokens": 4}
    cold = tm.generate(tiny_llama, PROMPT, random_vectors(2), temperature=1e-39, **options)
    assert cold.equals(tm.generate(tiny_llama, PROMPT, random_vectors(2), **options))


def break_long_ones(module, args, output):
    hidden = output[0] if isinstance(output, tuple) else output
    hidden = torch.where(hidden.norm(dim=-1, keepdim=True) > 100, torch.nan, hidden)
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


@pytest.fixture
def breaking():
    """A model whose residual stream becomes NaN after layer 3 where it is long; for one test."""
    model = tiny_bridge("llama")

    handle = model.blocks[3].register_forward_hook(break_long_ones)
    yield model
    handle.remove()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("fast", [False, True])
def test_what_is_not_finite_costs_its_own_text(breaking, monkeypatch, temperature, fast):
    vectors = random_vectors(3, size=2.0)
    vectors[1] *= 1000
    # A hook asks for the bridge; without it, too, what breaks is to be told.
    if fast:
        plain = without_bridge(breaking.original_model)
        plain.model.layers[3].register_forward_hook(break_long_ones)
        monkeypatch.setattr(generation, "plain_model", lambda _: plain)
    options = {"layer": 2, "max_new_tokens": 5, "temperature": temperature}
    with pytest.warns(UserWarning, match=r"vectors \[1 at scale 1 after 'Once upon") as caught:
        broken = tm.generate(breaking, PROMPT, vectors, **options)
    assert caught[0].filename == __file__
    assert broken["completion"][1] == ""
    assert all(broken["completion"][[0, 2]])
    if temperature == 0:
        alone = tm.generate(breaking, PROMPT, vectors[[0, 2]], **options)
        assert broken["completion"][[0, 2]].tolist() == alone["completion"].tolist()
    with pytest.raises(FloatingPointError, match="writes, steered after layer 2, is not finite"):
        tm.generate(breaking, PROMPT, vectors[1], **options)


def test_log_probs_that_are_not_finite_are_named(breaking):
    vectors = random_vectors(3, size=2.0)
    vectors[1] *= 1000
    with pytest.warns(UserWarning, match=r"vectors \[1\]: what .* makes of 'Once") as caught:
        rows = tm.next_token_log_probs(breaking, PROMPT, vectors, 2)
    assert caught[0].filename == __file__
    assert rows.isnan().all(-1).tolist() == [False, True, False]
    with pytest.raises(FloatingPointError, match="not finite under any of the vectors"):
        tm.next_token_log_probs(breaking, PROMPT, vectors[1], 2)


def test_effects_that_are_not_finite_are_named(breaking):
    f = tm.ActivationMap.from_prompts(breaking, PROMPT, 2, 4)
    vectors = random_vectors(3, size=2.0)
    long = 1000 * vectors[1]
    with pytest.warns(UserWarning, match=r"vectors \[2\]: the residual .* after layer 4") as caught:
        distances = effect_distance(f, torch.cat([vectors[:2], long[None]]), vectors[0])
    assert caught[0].filename == __file__
    assert distances.isnan().tolist() == [False, False, True]
    with pytest.raises(FloatingPointError, match="reference: the residual stream of"):
        effect_distance(f, vectors, long)
    with pytest.raises(ValueError, match=r"theta0: the residual .* 'Once upon"):
        tm.melbo_ortho(f, long, 1)
    with pytest.raises(FloatingPointError, match=r"vectors \[0, 1, 2\]: the effect .* 'Once upon"):
        tm.melbo(f, 5, 1000.0)


def test_divergences_that_are_not_finite_cost_their_vector(breaking, tmp_path):
    found = tm.SteeringVectors.from_tensor(random_vectors(5, size=2.0), source_layer=2)
    found = replace(found, vectors=found.vectors * torch.tensor([1, 1, 1, 1, 1000.0])[:, None])
    for batch_size in (2, 32):  # alone in its batch, and beside others
        with pytest.warns(UserWarning, match=r"vectors \[4\]: what .* is NaN") as caught:
            kl = tm.analysis.kl_divergence(breaking, PROMPT, found, batch_size=batch_size)
        assert caught[0].filename == __file__
        assert kl.isnan().tolist() == [False] * 4 + [True]
    alone = tm.analysis.kl_divergence(breaking, PROMPT, found[:4])
    torch.testing.assert_close(kl[:4], alone)
    with pytest.warns(UserWarning, match="not finite"):
        page = tm.report.write(
            tmp_path / "page.html", breaking, found, prompts=PROMPT, max_new_tokens=2
        )
    assert page["kl"].isna().tolist() == [False] * 4 + [True]
    with pytest.raises(FloatingPointError, match="not finite under any"):
        tm.analysis.kl_divergence(breaking, PROMPT, found[4])


def test_vectors_of_another_model_are_told_from_a_model_of_another_name():
    models = [tiny_bridge("llama", seed=seed) for seed in (0, 0, 1)]
    f = tm.ActivationMap.from_prompts(models[0], "Hi!", 1, 3)
    found = tm.random_vectors(f, 1, 1.0)
    for model in models[1:]:
        model.cfg.model_name = "other"
    assert len(tm.generate(models[1], "Hi!", found, max_new_tokens=1)) == 1
    with pytest.warns(
        UserWarning, match="vectors: found in tiny-llama, not in other; .* fits only"
    ):
        tm.generate(models[2], "Hi!", found, max_new_tokens=1)
