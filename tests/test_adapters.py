"""Adapters: against a slow implementation, finite differences, hooks by hand, known additions."""

import json
import math

import pytest
import torch
from safetensors.torch import save_file

import tl_melbo as tm
from tests.reference import adapters as slow
from tests.tiny_models import D_MODEL, N_CTX, N_LAYERS, tiny_bridge
from tl_melbo.adapters import _loss, _sampling, _training, join, situations
from tl_melbo.errors import Damaged, NotFinite
from tl_melbo.model.bridge import plain_model, residual_streams
from tl_melbo.model.tokens import end_tokens, to_tokens

PROMPTS = ["Once upon a time", "Hello there, my friend, how", "I"]
PROMPT = PROMPTS[0]
QUICK = {"max_new_tokens": 3, "steps": 2, "batch_size": 2}


def random_adapter(n=1, rank=2, shared=True, layers=tuple(range(N_LAYERS)), seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    pairs = 1 if shared else len(layers)
    A = torch.randn(n, pairs, D_MODEL, rank, generator=generator)
    B = torch.randn(n, pairs, rank, D_MODEL, generator=generator)
    return tm.Adapter.from_tensor(A, B, layers, **options)


@pytest.fixture(scope="module")
def model():
    return tiny_bridge("llama")


@pytest.fixture(scope="module")
def trained(model):
    return tm.divergence_adapter(model, PROMPTS, 2, **QUICK)


@pytest.mark.parametrize("shared", [True, False])
def test_training_is_that_of_a_slow_and_obvious_implementation(shared):
    model = tiny_bridge("llama", torch.float64)
    settings = {"rank": 2, "shared": shared, "learning_rate": 0.05, "alpha": 0.9, "beta": 0.4}
    found = tm.divergence_adapter(model, PROMPTS, 1, seed=3, length=1.5, **settings, **QUICK)
    tokens = [to_tokens(model, prompt)[0].tolist() for prompt in PROMPTS]
    ends = end_tokens(model.tokenizer, model.original_model, model.cfg.d_vocab)
    generator = _sampling.generator(3, 0)
    A = torch.randn(1 if shared else N_LAYERS, D_MODEL, 2, generator=generator)
    A, B, losses = slow.train(
        model, tokens, A, 2, 3, ends, generator, 2, 1.5, alpha=0.9, beta=0.4, lr=0.05
    )
    assert found.A.shape == (1, *A.shape)
    torch.testing.assert_close(found.A[0].double(), A, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.B[0].double(), B, rtol=1e-6, atol=1e-6)
    expected = torch.tensor([losses]).double()
    torch.testing.assert_close(found.history.double(), expected, rtol=1e-6, atol=1e-6)


def test_gradients_are_those_of_finite_differences():
    model = tiny_bridge("gpt2", torch.float64)  # others round to float32 in their norms
    rows = random_adapter().additions([1.0])
    A, B, size = (each.double() for each in (rows.A, rows.B, rows.size))
    prompts = [to_tokens(model, prompt) for prompt in PROMPTS]
    plain = plain_model(model)

    def at(A, B):
        added = type(rows)(A.requires_grad_(), B.requires_grad_(), size, rows.layers)
        return _loss.loss_and_gradients(model, plain, added, drawn, 1.1, 0.3)

    start = type(rows)(A, B, size, rows.layers)
    drawn = _sampling.sample(model, plain, start, prompts, 4, torch.Generator().manual_seed(0))
    measured, gradients = at(A, B)
    for place in range(2):
        towards = torch.randn(gradients[place].shape, generator=torch.Generator().manual_seed(5))
        step = 1e-6 * towards.double()
        moved = [[A.detach(), B.detach()], [A.detach(), B.detach()]]
        moved[0][place], moved[1][place] = moved[0][place] + step, moved[1][place] - step
        up, down = (at(*pair)[0].loss for pair in moved)
        slope = float((gradients[place] * towards).sum())
        assert (up - down) / 2e-6 == pytest.approx(slope, rel=1e-4, abs=1e-7)
    assert measured.kl > 0


@pytest.mark.parametrize("shared", [True, False])
def test_adds_what_a_hook_by_hand_adds(tiny, unchanged, shared):
    unchanged(tiny)
    adapter = random_adapter(shared=shared, length=3.0)
    tokens = to_tokens(tiny, PROMPT)
    with torch.no_grad():
        by_hand = slow.next_log_probs(tiny, tokens[0].tolist(), (adapter.A[0], adapter.B[0]), 3.0)
        half = slow.next_log_probs(tiny, tokens[0].tolist(), (adapter.A[0], adapter.B[0]), -1.5)
    with tm.steered(tiny, adapter), torch.no_grad():
        inside = tiny(tokens)[0, -1].log_softmax(-1)
    torch.testing.assert_close(inside, by_hand, rtol=1e-4, atol=1e-4)
    log_probs = tm.next_token_log_probs(tiny, PROMPT, adapter)[0]
    torch.testing.assert_close(log_probs, by_hand, rtol=1e-4, atol=1e-4)
    log_probs = tm.next_token_log_probs(tiny, PROMPT, adapter, scale=-0.5)[0]
    torch.testing.assert_close(log_probs, half, rtol=1e-4, atol=1e-4)


def test_an_adapter_that_is_off_is_the_model_bit_for_bit(tiny):
    adapter = random_adapter(2)
    off = tm.Adapter(adapter.A, torch.zeros_like(adapter.B), story=adapter.story)
    plain = tm.next_token_log_probs(tiny, PROMPT)
    tokens = to_tokens(tiny, PROMPT).expand(2, -1)
    with torch.no_grad():
        expected = tiny(tokens)
    for silent, scale in ((off, 1.0), (adapter, 0.0)):
        assert torch.equal(tm.next_token_log_probs(tiny, PROMPT, silent, scale=scale)[[0]], plain)
        with tm.steered(tiny, silent, scale=scale), torch.no_grad():
            assert torch.equal(tiny(tokens), expected)
        texts = tm.generate(tiny, PROMPT, silent, scales=scale, max_new_tokens=5)["completion"]
        assert {*texts} == {*tm.generate(tiny, PROMPT, max_new_tokens=5)["completion"]}


def test_each_row_of_a_batch_has_its_own_adapter(tiny):
    library = random_adapter(3, shared=False, layers=(1, 4))
    together = tm.next_token_log_probs(tiny, PROMPT, library)
    texts = tm.generate(tiny, PROMPT, library, scales=[1, -2], max_new_tokens=6)
    for number, one in enumerate(library):
        alone = tm.next_token_log_probs(tiny, PROMPT, one)
        torch.testing.assert_close(together[[number]], alone, rtol=1e-4, atol=1e-4)
        own = tm.generate(tiny, PROMPT, one, scales=[1, -2], max_new_tokens=6)["completion"]
        assert texts[texts["vector"] == number]["completion"].tolist() == own.tolist()
    assert len({*texts["completion"]}) > 1


def test_a_user_hook_fires_while_adapters_are_used_and_trained(model):
    seen = []
    with model.hooks([("blocks.2.hook_resid_post", lambda h, hook: seen.append(h.shape))]):
        hooked = tm.divergence_adapter(model, PROMPTS, 1, **QUICK)
    assert seen
    plain = tm.divergence_adapter(model, PROMPTS, 1, **QUICK)
    torch.testing.assert_close(hooked.B, plain.B, rtol=1e-3, atol=1e-3)


def test_an_adapter_does_not_depend_on_how_many_there_are(model, trained):
    alone = tm.divergence_adapter(model, PROMPTS, 1, first=1, **QUICK)
    assert torch.equal(alone.A, trained[1].A)
    assert torch.equal(alone.B, trained[1].B)
    assert not torch.equal(trained[0].A, trained[1].A)
    other = tm.divergence_adapter(model, PROMPTS, 1, seed=1, **QUICK)
    assert not torch.equal(other.A, trained[0].A)


def test_training_leaves_the_model_and_the_global_random_state_alone(unchanged):
    model = tiny_bridge("llama")
    unchanged(model)

    def stop(number, step, measured):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tm.divergence_adapter(model, PROMPTS, on_step=stop, **QUICK)
    with torch.no_grad():
        steps = []
        found = tm.divergence_adapter(model, PROMPTS, on_step=lambda *a: steps.append(a), **QUICK)
    assert [step[:2] for step in steps] == [(0, 1), (0, 2)]
    assert found.B.any()
    assert not found.A.requires_grad
    found.vectors(model, PROMPTS, max_new_tokens=2)


def test_what_an_adapter_tells(trained):
    table = trained.table()
    assert {"index", "loss", "kl", "nll", "entropy", "repetition", "collapsed"} <= {*table}
    # The mean over the last quarter of the steps: here, the last.
    assert trained.history.shape == (2, 2)
    torch.testing.assert_close(trained.columns["loss"], trained.history[:, -1])
    loss = 0.3 * table["nll"] - 1.1 * table["kl"]
    assert table["loss"].to_numpy() == pytest.approx(loss.to_numpy(), abs=1e-5)
    assert trained.story["prompts"] == PROMPTS
    assert trained.story["chat"] is False
    assert trained.story["hyperparameters"]["steps"] == 2


def test_a_collapse_is_told(model, monkeypatch):
    sound = {"repetition": 0.1, "kl": 2.0, "entropy": 3.0, "entropy_without": 3.5}
    words = {"repetition": "0.70 of what it writes repeats", "entropy": "an entropy of 9.0 nats"}
    assert not _training._collapse(sound, 49152)
    assert words["repetition"] in _training._collapse({**sound, "repetition": 0.7}, 49152)
    assert words["entropy"] in _training._collapse({**sound, "entropy": 9.0}, 49152)
    assert "surprised by 8.3 nats" in _training._collapse({**sound, "kl": 5.3}, 49152)
    # A model that is as uncertain by itself is not meant.
    assert not _training._collapse({**sound, "entropy": 9.0, "entropy_without": 9.0}, 49152)
    monkeypatch.setattr(_training, "DEFAULT_REPETITION", -1.0)
    with pytest.warns(UserWarning, match=r"adapter 0 has collapsed: a share of 0\.00"):
        found = tm.divergence_adapter(model, PROMPTS, 1, **QUICK)
    assert found.columns["collapsed"].tolist() == [1]


def test_tokens_after_the_end_do_not_count():
    out = torch.tensor([[7, 7, 8, 5, 2, 2], [4, 5, 6, 2, 2, 2], [0, 0, 9, 5, 5, 5]])
    drawn = _sampling._put_right(out, [2, 3, 1], 3, [2])
    assert drawn.tokens[0, :5].tolist() == [7, 8, 5, 2, 2]
    assert drawn.sampled.sum(1).tolist() == [2, 1, 3]
    assert drawn.text.sum(1).tolist() == [4, 4, 4]
    assert drawn.tokens[2][drawn.sampled[2]].tolist() == [5, 5, 5]


def test_the_vectors_of_an_adapter_that_always_adds_the_same(model):
    h = residual_streams(model, to_tokens(model, PROMPT), [2])[0][0]
    # A reads the same number from every token, so B is added everywhere.
    a = torch.linalg.lstsq(h.double(), torch.ones(len(h), 1).double()).solution.float()
    b = torch.randn(1, D_MODEL, generator=torch.Generator().manual_seed(0))
    adapter = tm.Adapter.from_tensor(a[None, None], b[None, None], [2], length=2.0)
    expected = 2 * b / b.norm()
    for estimator in ("addition", "difference"):
        options = {"estimator": estimator, "max_new_tokens": 0}
        found = adapter.vectors(model, PROMPT, layer=2, **options)
        torch.testing.assert_close(found.vectors, expected, rtol=1e-4, atol=1e-4)
        assert found.source_layer == 2
        assert float(found.columns["constant_share"][0]) == pytest.approx(1, abs=1e-4)
    torch.testing.assert_close(
        tm.next_token_log_probs(model, PROMPT, found),
        tm.next_token_log_probs(model, PROMPT, adapter),
        rtol=1e-3, atol=1e-3,
    )  # fmt: skip


def test_vectors_are_means_over_tokens_of_what_is_changed(model):
    adapter = random_adapter(2, length=1.0)
    A, B = adapter.A[1, 0], adapter.B[1, 0]
    layers = range(N_LAYERS)
    base, adapted = [], []
    for prompt in PROMPTS:
        tokens = to_tokens(model, prompt)
        base.append(torch.stack(residual_streams(model, tokens, layers))[:, 0])
        adds = [
            (f"blocks.{layer}.hook_resid_post", lambda h, hook: h + slow.added(h, A, B, 1.0))
            for layer in layers
        ]
        with model.hooks(adds):
            adapted.append(torch.stack(residual_streams(model, tokens, layers))[:, 0])
    before, after = torch.cat(base, 1), torch.cat(adapted, 1)
    changes = {"difference": after - before, "addition": slow.added(before, A, B, 1.0)}
    for estimator, change in changes.items():
        found = adapter[1].vectors(model, PROMPTS, estimator, max_new_tokens=0)
        assert found.layers == tuple(layers)
        means = change.double().mean(1)
        torch.testing.assert_close(found.vectors[0].double(), means, rtol=1e-4, atol=1e-5)
        share = means.square().sum(-1) / change.double().square().sum(-1).mean(1)
        told = found.columns["constant_share"][0].double()
        torch.testing.assert_close(told, share, rtol=1e-4, atol=1e-5)
    options = {"max_new_tokens": 4, "positions": slice(1, None)}
    both = adapter.vectors(model, PROMPTS, "addition", **options)
    told = []
    options["on_batch"] = lambda *counts: told.append(counts)
    alone = adapter[1].vectors(model, PROMPTS, "addition", **options)
    assert told == [(done + 1, len(PROMPTS)) for done in range(len(PROMPTS))]
    told.clear()
    assert torch.equal(adapter.vectors(model, PROMPTS, "addition", **options).vectors, both.vectors)
    assert told[-1] == (2 * len(PROMPTS), 2 * len(PROMPTS))
    torch.testing.assert_close(both[1].vectors, alone.vectors)
    # Whatever the order in which the blocks are named.
    turned = random_adapter(2, length=1.0, layers=(4, 1))[1]
    sorted_ = random_adapter(2, length=1.0, layers=(1, 4))[1]
    for estimator in changes:
        one, other = (each.vectors(model, PROMPTS, estimator, max_new_tokens=0)
                      for each in (turned, sorted_))  # fmt: skip
        torch.testing.assert_close(one.at(1).vectors, other.at(1).vectors)
    backwards = {"max_new_tokens": 0, "positions": slice(None, None, -1)}
    found = adapter[1].vectors(model, PROMPTS, "addition", **backwards)
    torch.testing.assert_close(found.vectors[0].double(), means, rtol=1e-4, atol=1e-5)


def test_saved_and_loaded_and_joined(trained, tmp_path):
    path = tmp_path / "a.safetensors"
    trained.save(path)
    read = tm.Adapter.load(path)
    assert torch.equal(read.A, trained.A)
    assert torch.equal(read.B, trained.B)
    assert torch.equal(read.history, trained.history)
    assert dict(read.story) == dict(trained.story)
    assert read.table().equals(trained.table())
    assert (len(read[[1, 0]]), read[1].columns["index"].tolist()) == (2, [1])
    assert torch.equal(join([read[0], read[1]]).B, read.B)
    with pytest.raises(IndexError, match="holds 2 rows"):
        read[2]
    with pytest.raises(ValueError, match=r"read it with Adapter\.load, not with SteeringVectors"):
        tm.SteeringVectors.load(path)
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(Damaged, match=r"a\.safetensors"):
        tm.Adapter.load(path)
    with pytest.raises(FileNotFoundError):
        tm.Adapter.load(tmp_path / "none.safetensors")


@pytest.mark.parametrize(
    ("story", "tensors"),
    [
        ({"layers": [0]}, {"A": torch.ones(1, 1, 4, 2)}),
        ({"layers": [0]}, {"A": torch.ones(1, 1, 4, 2), "B": torch.ones(1, 1, 2, 5)}),
        ({"layers": [0]}, {"A": torch.ones(1, 1, 4, 2), "B": torch.full((1, 1, 2, 4), math.nan)}),
        ({"layers": [0, 1]}, {"A": torch.ones(1, 3, 4, 2), "B": torch.ones(1, 3, 2, 4)}),
        ({"layers": ["0"]}, {"A": torch.ones(1, 1, 4, 2), "B": torch.ones(1, 1, 2, 4)}),
        ({}, {"A": torch.ones(1, 1, 4, 2), "B": torch.ones(1, 1, 2, 4)}),
        ({"layers": [0], "hyperparameters": {"length": -1}},
         {"A": torch.ones(1, 1, 4, 2), "B": torch.ones(1, 1, 2, 4)}),
    ],
)  # fmt: skip
def test_files_that_make_no_sense_are_damaged(tmp_path, story, tensors):
    path = tmp_path / "a.safetensors"
    metadata = {"format": "tl_melbo.adapter", "format_version": "1", "story": json.dumps(story)}
    save_file(tensors, path, metadata)
    with pytest.raises(Damaged, match=r"a\.safetensors"):
        tm.Adapter.load(path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": D_MODEL + 1}, f"rank={D_MODEL + 1}: from 1 to d_model={D_MODEL}"),
        ({"rank": 0}, "rank=0"),
        ({"layers": [0, N_LAYERS]}, f"layers={N_LAYERS}: .* has {N_LAYERS} layers"),
        ({"layers": [1, 1]}, "each once"),
        ({"layers": []}, "each once"),
        ({"max_new_tokens": N_CTX}, f"max_new_tokens={N_CTX}: after a prompt of"),
        ({"max_new_tokens": 0}, "max_new_tokens=0: at least 1"),
        ({"n_adapters": 0}, "n_adapters=0: at least 1"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"steps": 0}, "steps=0"),
        ({"seed": -1}, "seed=-1"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"length": math.inf}, "length"),
        ({"alpha": math.nan}, "alpha"),
        ({"prompts": []}, "prompts: none given"),
        ({"prompts": ["ok", " "]}, r"prompts\[1\]"),
    ],
)
def test_bad_arguments_are_named(model, options, message):
    with pytest.raises(ValueError, match=message):
        tm.divergence_adapter(model, **{"prompts": PROMPTS, **options})


def test_adapters_and_models_that_do_not_belong_together(model, trained):
    wide = tm.Adapter.from_tensor(torch.ones(1, 1, 8, 2), torch.ones(1, 1, 2, 8), [0])
    with pytest.raises(ValueError, match="8 wide"):
        tm.generate(model, PROMPT, wide)
    deep = random_adapter(layers=(N_LAYERS,))
    with pytest.raises(ValueError, match=f"layer={N_LAYERS}"):
        tm.next_token_log_probs(model, PROMPT, deep)
    with pytest.raises(ValueError, match="knows its layers"):
        tm.generate(model, PROMPT, trained, layer=2)
    with pytest.raises(ValueError, match="of length 0"):
        tm.generate(model, PROMPT, trained[:0])
    with pytest.raises(ValueError, match="layer=7: the adapter's blocks"):
        trained.vectors(model, PROMPT, layer=7)
    with pytest.raises(ValueError, match="no token of any text"):
        trained.vectors(model, PROMPT, max_new_tokens=0, positions=slice(200, None))
    with pytest.raises(TypeError, match="estimator"):
        trained.vectors(model, PROMPT, "mean")
    with pytest.raises(TypeError, match="TransformerLens model"):
        tm.divergence_adapter(torch.nn.Linear(2, 2))
    with tm.steered(model, trained), pytest.raises(ValueError, match="a batch of 3"):
        model(to_tokens(model, PROMPT).expand(3, -1))


def test_logits_that_are_not_finite_are_told():
    model = tiny_bridge("llama")
    with torch.no_grad():
        model.original_model.model.norm.weight.fill_(torch.nan)
    with pytest.raises(NotFinite, match="not finite"):
        tm.divergence_adapter(model, PROMPTS, **QUICK)


def test_the_prompts_that_come_with_the_package():
    table = situations()
    assert len({*table["situation"]}) == 24
    assert not table["prompt"].duplicated().any()
    counts = table.groupby(["situation", "split"]).size().unstack()
    assert (counts["train"] == 16).all()
    assert (counts["held_out"] == 4).all()
    assert table["prompt"].str.len().between(40, 220).all()
