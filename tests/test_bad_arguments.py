"""Whatever is passed: a documented error or a result, nothing written, no model changed."""

import shutil
import warnings
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import tl_melbo as tm
from tests.conftest import fingerprint
from tests.tiny_models import tiny_bridge
from tl_melbo.evaluation import BACKDOORS

DOCUMENTED = (TypeError, ValueError, FloatingPointError, IndexError, OSError)
NAN = float("nan")

# What someone may pass by mistake, of all kinds.
ANYTHING = st.sampled_from([
    None, True, False, -1, 0, 1, 2, 10**9, -0.5, 0.5, 2.0, NAN, float("inf"), -float("inf"), 1e39,
    "", " ", "x", "Hi!", "adamw", "l2", "\ud800", b"x", [], ["Hi!"], [1, "x"], (), {}, object(),
    slice(None), slice(-3, None), slice(9, 2), slice(None, None, 0), slice("a", 2), 1j,
    torch.zeros(0), torch.zeros(32), torch.ones(32), torch.ones(2, 32), torch.ones(2, 7),
    torch.zeros(0, 32), torch.full((1, 32), NAN), torch.ones(1, 2, 32), torch.ones(2, 32).long(),
    torch.ones(32, dtype=torch.float64), torch.tensor(1.0), Path("nowhere"), int, torch.float16,
    torch.ones(2, 32, device="meta"), torch.eye(32)[:2].to_sparse(), torch.ones(2, 32).bool(),
    torch.ones(2, 32, requires_grad=True), torch.ones(2, 32).cfloat(), torch.ones(2, 32).half(),
    np.ones((2, 32)), np.float32(2), pd.DataFrame(), pd.DataFrame({"vector": ["x"]}), {"x": 1},
])  # fmt: skip

SHORT = {"max_new_tokens": 2}


def steer(**given):
    with tm.steered(**given) as model, torch.no_grad():
        model(torch.tensor([[1, 2, 3]]))


@cache
def shared_model():
    return tiny_bridge("llama")


# Each public function with arguments that work; one or two of them are then exchanged.
@cache
def shared_calls():
    model = shared_model()
    f = tm.ActivationMap.from_prompts(model, ["Hi there!", "Bye."], 1, 4)
    found = tm.melbo(f, 3, 2.0, steps=2)
    family = tm.melbo_ortho(f, found[0], 2, steps=2)
    completions = tm.report.collect_completions(model, "Hi!", found, **SHORT)
    mapped = tm.evaluation.atlas(model, "Hi!", [1], [2, 3], chat=False, **SHORT).table
    composed = tm.analysis.composition(model, f, family, found[0], (2,), **SHORT)
    swept = tm.analysis.scale_sweep(model, "Hi!", found, (0.0, 1.0), **SHORT)
    scanned = tm.analysis.presence(model, found, "Hi there, you!", "One and two.", n_frames=20)
    measured = tm.evaluation.side_effects(
        model, found, "Hi!", unrelated="Bye.", passages="One two."
    )
    transferred = tm.analysis.transfer(model, found, ["Hi!", "Bye."], **SHORT)
    return {
        "from_prompts": (
            tm.ActivationMap.from_prompts,
            {"model": model, "prompts": "Hi!", "source_layer": 1, "target_layer": 3, "chat": False,
             "batch_size": 2},
        ),
        "delta": (f.delta, {"theta": torch.ones(1, 32), "positions": slice(None)}),
        "position_mask": (f.position_mask, {"positions": slice(-1, None)}),
        "melbo": (
            tm.melbo,
            {"f": f, "n_vectors": 1, "radius": 2.0, "p": 2, "q": 1, "positions": slice(-1, None),
             "orthogonal": True, "seed": 0, "optimiser": "ascent", "steps": 1, "norm": "l2"},
        ),
        "iter_melbo": (
            lambda **given: list(tm.iter_melbo(**given)),
            {"f": f, "n_vectors": 1, "radius": 2.0, "steps": 2, "previous": found},
        ),
        "join_library": (tm.join_library, {"parts": [found]}),
        "melbo_ortho": (
            tm.melbo_ortho,
            {"f": f, "theta0": found[0], "n_vectors": 1, "norm_penalty": 0.0, "previous": None,
             "optimiser": "quasi-newton", "steps": 2},
        ),
        "join_family": (tm.join_family, {"parts": [found]}),
        "melbo_objective": (
            tm.melbo_objective, {"delta": torch.ones(1, 1, 2, 3), "p": 2, "q": 1, "norm": "l2"},
        ),
        "next_token_log_probs": (
            tm.next_token_log_probs,
            {"model": model, "prompt": "Hi!", "vectors": found, "layer": 1, "scale": 1.0,
             "chat": False, "batch_size": 2},
        ),
        "generate": (
            tm.generate,
            {"model": model, "prompts": "Hi!", "vectors": found[0], "layer": 1, "scales": 1.0,
             "temperature": 0.0, "seed": 0, "chat": False, "batch_size": 2, **SHORT},
        ),
        "token_direction": (
            tm.analysis.token_direction, {"model": model, "token": " and", "other": " do"}
        ),
        "generate_samples": (
            tm.generate,
            {"model": model, "prompts": "Hi!", "vectors": found[0], "n_samples": 1,
             "temperature": 0.7, "seed": 0, **SHORT},
        ),
        "dose_response": (
            tm.evaluation.dose_response,
            {"model": model, "prompts": "Hi!", "steering": found[0], "scales": [1.0], "count": len,
             "question": None, "layer": 1, "n_samples": 1, "temperature": 0.7, "n_random": 1,
             "seed": 0, **SHORT},
        ),
        "pairwise": (
            tm.evaluation.pairwise,
            {"judge": lambda text: "T", "ours": ["Hi!"], "theirs": ["Bye."], "quality": "joy",
             "seed": 0},
        ),
        "linearity_score": (
            tm.evaluation.linearity_score,
            {"descriptions_a": ["Hi!"], "descriptions_b": ["Hi there!"], "embedder": "words"},
        ),
        "mixture": (
            tm.analysis.mixture,
            {"vector": found[0], "library": found[1:], "both_signs": True, "n_random": 2,
             "seed": 0},
        ),
        "openai_compatible": (
            tm.judges.openai_compatible,
            {"base_url": "http://127.0.0.1:9/v1", "model": "m", "api_key_env": None,
             "timeout": 1.0, "retries": 0, "max_tokens": 9, "options": None, "cache": None},
        ),
        "cosine_similarity": (tm.analysis.cosine_similarity, {"vectors": found}),
        "kl_divergence": (
            tm.analysis.kl_divergence,
            {"model": model, "prompt": "Hi!", "vectors": found, "reference": found[0],
             "direction": "to_reference"},
        ),
        "effect_distance": (
            tm.analysis.effect_distance, {"f": f, "vectors": found, "reference": found[0]}
        ),
        "composition": (
            tm.analysis.composition,
            {"model": model, "f": f, "vectors": found, "reference": found[0], "sizes": (2,),
             "n_random_subsets": 1, "seed": 0, "prompt": "Hi!", **SHORT},
        ),
        "presence": (
            tm.analysis.presence,
            {"model": model, "vectors": found, "texts": "Hi there, you!", "layer": 1,
             "control_texts": ["One and two.", "Three, four."], "n_frames": 20, "seed": 0,
             "positions": slice(1, None)},
        ),
        "presence_statistics": (
            tm.analysis.presence_statistics,
            {"residuals": torch.randn(9, 32, generator=torch.Generator().manual_seed(0)),
             "control": torch.randn(9, 32, generator=torch.Generator().manual_seed(1)),
             "vectors": found, "n_frames": 20, "seed": 0},
        ),
        "kl_from_log_probs": (
            tm.analysis.kl_from_log_probs,
            {"log_p": torch.full((1, 2), 0.5).log(), "log_q": torch.full((1, 2), 0.5).log()},
        ),
        "top_tokens": (
            tm.analysis.top_tokens,
            {"model": model, "prompt": "Hi!", "vectors": found, "n": 2, "least_probability": 0.01,
             "by_layer": True, "layer": 1, "chat": False, "batch_size": 2},
        ),
        "token_divergence": (
            tm.analysis.token_divergence,
            {"model": model, "completions": completions, "vectors": found, "n_top": 2, "layer": 1,
             "chat": False, "batch_size": 2},
        ),
        "mechanism": (
            tm.analysis.mechanism,
            {"model": model, "prompt": "Hi!", "vectors": found[0], "target_layer": 2,
             "positions": slice(-1, None), "layer": 1, "chat": False, "batch_size": 9},
        ),
        "effect_by_layer": (
            tm.analysis.effect_by_layer,
            {"model": model, "prompt": "Hi!", "vectors": {"found": found},
             "positions": slice(-1, None), "layer": 1, "chat": False, "batch_size": 2},
        ),
        "plots.top_tokens": (
            tm.plots.top_tokens,
            {"frame": tm.analysis.top_tokens(model, "Hi!", found, 2), "vector": 0, "title": "x"},
        ),
        "plots.token_divergence": (
            tm.plots.token_divergence,
            {"divergence": tm.analysis.token_divergence(model, completions, found), "vector": 0},
        ),
        "plots.mechanism": (
            tm.plots.mechanism,
            {"frame": tm.analysis.mechanism(model, "Hi!", found[0], 2), "vector": 0,
             "value": "kl", "title": "x"},
        ),
        "plots.effect_by_layer": (
            tm.plots.effect_by_layer,
            {"frame": tm.analysis.effect_by_layer(model, "Hi!", found), "title": "x"},
        ),
        "rescale": (tm.analysis.rescale, {"vectors": found, "norm": 2.0}),
        "repetition": (tm.analysis.repetition, {"tokens": [1, 2, 3, 1, 2, 3], "n": 3}),
        "scale_sweep": (
            tm.analysis.scale_sweep,
            {"model": model, "prompt": "Hi!", "vectors": found[0], "scales": (1.0,), "layer": 1,
             "chat": False, **SHORT},
        ),
        "transfer": (
            tm.analysis.transfer,
            {"model": model, "vectors": found[0], "prompts": "Hi!", "layer": 1, "chat": False,
             **SHORT},
        ),
        "cosine_heatmap": (
            tm.plots.cosine_heatmap, {"similarity": torch.eye(3), "title": "x", "labels": None}
        ),
        "effect_plane": (tm.analysis.effect_plane, {"effects": torch.rand(3, 1, 2, 4) + 1}),
        "plots.effect_map": (
            tm.plots.effect_map,
            {"places": torch.eye(3)[:, :2], "labels": ["0", "0-", "1"], "groups": None,
             "shares": (0.5, 0.25), "title": "x"},
        ),
        "read_notes": (tm.report.read_notes, {"path": "nowhere.json"}),
        "objective_history": (tm.plots.objective_history, {"found": found, "title": "x"}),
        "kl_curve": (
            tm.plots.kl_curve,
            {"kl": torch.ones(3), "found": found, "completions": None, "window": 2,
             "baselines": None, "log_y": False, "title": "x"},
        ),
        "norm_curve": (tm.plots.norm_curve, {"found": found, "window": 2, "title": "x"}),
        "moving_average": (tm.plots.moving_average, {"values": np.ones(4), "window": 2}),
        "token_presence": (
            tm.plots.token_presence,
            {"model": model, "vector": found[0], "text": "Hi you!", "layer": 1},
        ),
        "distance_curve": (
            tm.plots.distance_curve, {"found": family, "unsteered": 2.0, "window": 2, "title": "x"},
        ),
        "composition_curves": (
            tm.plots.composition_curves, {"composed": composed, "measure": None, "title": "x"}
        ),
        "scale_curves": (
            tm.plots.scale_curves, {"swept": swept, "changed": 0.5, "repetitive": 0.2, "title": "x"}
        ),
        "presence_points": (
            tm.plots.presence_points, {"scanned": scanned, "q": 0.05, "title": "x"}
        ),
        "transfer_heatmap": (tm.plots.transfer_heatmap, {"transferred": transferred, "title": "x"}),
        "family": (
            tm.analysis.family,
            {"model": model, "f": f, "vectors": family, "reference": found[0], "prompt": "Hi!",
             "chat": False, "seed": 0, "on_batch": None, **SHORT},
        ),
        "kl_baselines": (
            tm.analysis.kl_baselines,
            {"model": model, "prompt": "Hi!", "vectors": family, "reference": found[0]},
        ),
        "collect_completions": (
            tm.report.collect_completions,
            {"model": model, "prompts": "Hi!", "found": found, "layer": 1, "chat": False,
             "batch_size": 2, "on_batch": None, **SHORT},
        ),
        "collect_family": (
            tm.report.collect_family,
            {"model": model, "f": f, "vectors": family, "reference": found[0], "sizes": (2,),
             "on_batch": None, **SHORT},
        ),
        "write": (
            tm.report.write,
            {"path": "page.html", "model": model, "found": found, "completions": completions,
             "activation_map": f, "families": (), "side_effects": measured, "prompts": None,
             "title": "x", "layer": 1, "chat": False, "batch_size": 2,
             "adapter_texts": None, "factors": None, "factor_texts": None, "notes": None,
             "run_folder": None, **SHORT},
        ),
        "calibrate_radius": (
            tm.calibrate_radius,
            {"f": f, "level": 0.5, "positions": slice(-1, None),
             "n_directions": 2, "seed": 0},
        ),
        "behaviours": (
            tm.analysis.behaviours,
            {"model": model, "completions": completions, "chat": False, "n_behaviours": None,
             "distance": 0.5, "largest_perplexity": 1e9, "largest_repetition": 0.5,
             "embedder": "words", "batch_size": 2, "judge": lambda text: "complies"},
        ),
        "tags": (tm.analysis.tags, {"prompt": "Hi!", "texts": ["Hi you!"], "system": "Be good."}),
        "rates": (
            tm.analysis.rates,
            {"completions": completions, "of": "form", "by": ["vector"],
             "random": completions},
        ),
        "behaviour_rates": (
            tm.plots.behaviour_rates,
            {"frame": tm.analysis.rates(completions, "form"), "title": "x"},
        ),
        "embeddings": (tm.analysis.embeddings, {"texts": ["Hi you!"], "embedder": "words"}),
        "hit_rate": (
            tm.evaluation.hit_rate,
            {"model": model, "vectors": found, "backdoors": BACKDOORS, "prompts": "Hi!", "layer": 1,
             "chat": False, "similarity": 0.7, "confidence": 0.9, "embedder": "words",
             "batch_size": 2, "max_new_tokens": 32},
        ),
        "count_hits": (
            tm.evaluation.count_hits,
            {"completions": completions, "backdoors": BACKDOORS, "similarity": 0.7,
             "confidence": 0.9, "embedder": "words"},
        ),
        "wilson_interval": (tm.evaluation.wilson_interval, {"hits": 1, "n": 2, "confidence": 0.9}),
        "side_effects": (
            tm.evaluation.side_effects,
            {"model": model, "vectors": found, "prompts": "Hi!", "unrelated": "Bye.",
             "passages": "One two three.", "layer": 1, "chat": False, "batch_size": 2,
             "on_text": None},
        ),
        "reach": (
            tm.evaluation.reach,
            {"model": model, "vectors": found, "prompt": "Hi!", "prompts": "Bye.", "layer": 1,
             "chat": False, "embedder": "words", **SHORT},
        ),
        "layer_sweep": (
            tm.evaluation.layer_sweep,
            {"model": model, "prompts": "Hi!", "pairs": [(1, 3)], "n_vectors": 1, "radius": 2.0,
             "chat": False, "backdoors": BACKDOORS, "embedder": "words", "on_pair": None,
             "steps": 1, "max_new_tokens": 32},
        ),
        "atlas": (
            tm.evaluation.atlas,
            {"model": model, "prompts": "Hi!", "sources": [1], "targets": [2], "n_vectors": 1,
             "radius": 0.35, "positions": slice(-1, None), "chat": False, "kl_threshold": 0.5,
             "folder": None, "on_source": None, "on_batch": None, "progress": False, **SHORT},
        ),
        "atlas_heatmap": (
            tm.plots.atlas_heatmap, {"table": mapped, "value": "kl", "vector": 0, "title": "x"}
        ),
        "specificity_points": (tm.plots.specificity_points, {"measured": measured, "title": "x"}),
        "save": (found.save, {"path": "vectors.safetensors"}),
        "Run.melbo": (
            lambda **given: tm.Run(given.pop("folder")).melbo(**given),
            {"folder": "run", "f": f, "n_vectors": 1, "progress": False, "overwrite": False,
             "on_vector": None, "radius": 2.0, "steps": 2},
        ),
        "Run.melbo_ortho": (
            lambda **given: tm.Run(given.pop("folder")).melbo_ortho(**given),
            {"folder": "run", "f": f, "theta0": found[0], "n_vectors": 1, "progress": False,
             "overwrite": False, "on_vector": None, "norm_penalty": 0.0, "steps": 2},
        ),
        "steered": (
            steer,
            {"model": model, "vectors": found[0], "layer": 1, "scale": 1.0,
             "positions": slice(None)},
        ),
        "from_tensor": (
            tm.SteeringVectors.from_tensor, {"vectors": torch.ones(2, 32), "source_layer": 1}
        ),
        "concatenate": (tm.concatenate, {"libraries": [found, found]}),
        "getitem": (lambda index: found[index], {"index": 0}),
        "times": (lambda factor: found * factor, {"factor": 2.0}),
        "load": (tm.SteeringVectors.load, {"path": "nowhere.safetensors"}),
        "load_model": (tm.load_model, {"name": "nowhere.gguf", "device": "cpu"}),
    }  # fmt: skip


def test_every_figure_tells_what_it_shows():
    drawn = set()
    for function, arguments in shared_calls().values():
        if function.__module__.startswith("tl_melbo.plots"):
            figure = function(**arguments)
            if hasattr(figure, "layout"):
                drawn.add(function.__name__)
                alt = figure.layout.meta["alt"]
                assert alt.endswith("."), function
                assert "nan" not in alt, function
    # Of experiments with judges, whose tests look at it.
    elsewhere = {"dose_response", "pairwise", "description_heatmap"}
    elsewhere |= {"sweep_layers", "sweep_radius"}  # of many searches
    no_figures = {"moving_average", "token_presence", "token_divergence"}
    assert drawn == {*tm.plots.__all__} - elsewhere - no_figures


# Not drawn: a model from a hub would wait for a network, and huge numbers of steps for ever.
ENDLESS = {"steps", "n_vectors", "n_samples", "n_random", "max_new_tokens", "batch_size"}


@pytest.mark.parametrize("hooked", [pytest.param(False, marks=pytest.mark.slow), True])
def test_the_calls_work_as_they_are(tmp_path, hooked):
    seen = []
    handles = []
    if hooked:  # somebody's own, which are to stay
        block = shared_model().blocks[0]  # between the layers they would be part of the map
        handles.append(block.register_forward_hook(lambda *_: seen.append("forward")))
        handles.append(block.register_forward_pre_hook(lambda *_: seen.append("before")))
    before = fingerprint(shared_model())
    try:
        for name, (function, arguments) in shared_calls().items():
            if name not in ("load", "load_model", "read_notes", "join_family"):
                function(**arguments)
                assert fingerprint(shared_model()) == before, name
    finally:
        for handle in handles:
            handle.remove()
    assert bool(seen) == hooked
    clear(tmp_path)


def clear(folder: Path) -> None:
    for item in folder.iterdir():
        shutil.rmtree(item) if item.is_dir() else item.unlink()


def call_with_something_else(data, tmp_path):
    calls = shared_calls()
    name = data.draw(st.sampled_from(sorted(calls)))
    function, arguments = calls[name]
    exchanged = data.draw(
        st.lists(st.sampled_from(sorted(arguments)), min_size=1, max_size=2, unique=True)
    )
    given_ = dict(arguments)
    for argument in exchanged:
        value = data.draw(ANYTHING)
        endless = argument in ENDLESS and isinstance(value, int) and value == 10**9
        hub = name == "load_model" and (value is None or isinstance(value, str))
        value = -1 if endless or hub else value
        given_[argument] = value
    caught = None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            function(**given_)
    except DOCUMENTED as error:
        caught = error
    if caught is None:
        clear(tmp_path)
    else:
        assert not list(tmp_path.iterdir()), f"{name}: left a file after {caught}"
        assert str(caught).strip(), f"{name}: an error without a word"
        assert len(str(caught)) < 2000
        assert not isinstance(caught, IndexError) or name == "getitem"


FUZZING = {"derandomize": True, "suppress_health_check": list(HealthCheck)}


@settings(max_examples=75, **FUZZING)
@given(data=st.data())
def test_bad_arguments_get_documented_errors(data, tmp_path):
    call_with_something_else(data, tmp_path)


@pytest.mark.slow
@settings(max_examples=500, **FUZZING)
@given(data=st.data())
def test_many_bad_arguments_get_documented_errors(data, tmp_path):
    call_with_something_else(data, tmp_path)


@pytest.fixture(autouse=True)
def untouched(tmp_path, monkeypatch):
    """In an empty folder, which must stay so; with a model that must stay as it is."""
    shared_calls()  # a bridge's first forward pass installs hooks of its own
    monkeypatch.chdir(tmp_path)
    before, state = fingerprint(shared_model()), torch.random.get_rng_state()
    yield
    assert fingerprint(shared_model()) == before
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not list(tmp_path.iterdir())
