"""Whatever is passed: a documented error or a result, nothing written, no model changed."""

import shutil
import warnings
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

MODEL = tiny_bridge("llama")
MAP = tm.ActivationMap.from_prompts(MODEL, ["Hi there!", "Bye."], 1, 4)
FOUND = tm.melbo(MAP, 3, 2.0, steps=2)
SHORT = {"max_new_tokens": 2}
FAMILY = tm.melbo_ortho(MAP, FOUND[0], 2, steps=2)
COMPLETIONS = tm.report.collect_completions(MODEL, "Hi!", FOUND, **SHORT)
COMPOSED = tm.analysis.composition(MODEL, MAP, FAMILY, FOUND[0], (2,), **SHORT)
SWEPT = tm.analysis.scale_sweep(MODEL, "Hi!", FOUND, (0.0, 1.0), **SHORT)
SCANNED = tm.analysis.presence(MODEL, FOUND, "Hi there, you!", "One and two.", n_frames=20)
MEASURED = tm.evaluation.side_effects(MODEL, FOUND, "Hi!", unrelated="Bye.", passages="One two.")
TRANSFERRED = tm.analysis.transfer(MODEL, FOUND, ["Hi!", "Bye."], **SHORT)


def steer(**given):
    with tm.steered(**given) as model, torch.no_grad():
        model(torch.tensor([[1, 2, 3]]))


# Each public function with arguments that work; one or two of them are then exchanged.
CALLS = {
    "from_prompts": (
        tm.ActivationMap.from_prompts,
        {"model": MODEL, "prompts": "Hi!", "source_layer": 1, "target_layer": 3, "chat": False,
         "batch_size": 2},
    ),
    "delta": (MAP.delta, {"theta": torch.ones(1, 32), "positions": slice(None)}),
    "position_mask": (MAP.position_mask, {"positions": slice(-1, None)}),
    "melbo": (
        tm.melbo,
        {"f": MAP, "n_vectors": 1, "radius": 2.0, "p": 2, "q": 1, "positions": slice(-1, None),
         "orthogonal": True, "seed": 0, "optimiser": "ascent", "steps": 1, "norm": "l2"},
    ),
    "iter_melbo": (
        lambda **given: list(tm.iter_melbo(**given)),
        {"f": MAP, "n_vectors": 1, "radius": 2.0, "steps": 2, "previous": FOUND},
    ),
    "join_library": (tm.join_library, {"parts": [FOUND]}),
    "melbo_ortho": (
        tm.melbo_ortho,
        {"f": MAP, "theta0": FOUND[0], "n_vectors": 1, "norm_penalty": 0.0, "previous": None,
         "optimiser": "quasi-newton", "steps": 2},
    ),
    "join_family": (tm.join_family, {"parts": [FOUND]}),
    "melbo_objective": (
        tm.melbo_objective, {"delta": torch.ones(1, 1, 2, 3), "p": 2, "q": 1, "norm": "l2"},
    ),
    "next_token_log_probs": (
        tm.next_token_log_probs,
        {"model": MODEL, "prompt": "Hi!", "vectors": FOUND, "layer": 1, "scale": 1.0,
         "chat": False, "batch_size": 2},
    ),
    "generate": (
        tm.generate,
        {"model": MODEL, "prompts": "Hi!", "vectors": FOUND[0], "layer": 1, "scales": 1.0,
         "temperature": 0.0, "seed": 0, "chat": False, "batch_size": 2, **SHORT},
    ),
    "cosine_similarity": (tm.analysis.cosine_similarity, {"vectors": FOUND}),
    "kl_divergence": (
        tm.analysis.kl_divergence,
        {"model": MODEL, "prompt": "Hi!", "vectors": FOUND, "reference": FOUND[0],
         "direction": "to_reference"},
    ),
    "effect_distance": (
        tm.analysis.effect_distance, {"f": MAP, "vectors": FOUND, "reference": FOUND[0]}
    ),
    "composition": (
        tm.analysis.composition,
        {"model": MODEL, "f": MAP, "vectors": FOUND, "reference": FOUND[0], "sizes": (2,),
         "n_random_subsets": 1, "seed": 0, "prompt": "Hi!", **SHORT},
    ),
    "presence": (
        tm.analysis.presence,
        {"model": MODEL, "vectors": FOUND, "texts": "Hi there, you!", "layer": 1,
         "control_texts": ["One and two.", "Three, four."], "n_frames": 20, "seed": 0,
         "positions": slice(1, None)},
    ),
    "presence_statistics": (
        tm.analysis.presence_statistics,
        {"residuals": torch.randn(9, 32, generator=torch.Generator().manual_seed(0)),
         "control": torch.randn(9, 32, generator=torch.Generator().manual_seed(1)),
         "vectors": FOUND, "n_frames": 20, "seed": 0},
    ),
    "kl_from_log_probs": (
        tm.analysis.kl_from_log_probs,
        {"log_p": torch.full((1, 2), 0.5).log(), "log_q": torch.full((1, 2), 0.5).log()},
    ),
    "rescale": (tm.analysis.rescale, {"vectors": FOUND, "norm": 2.0}),
    "repetition": (tm.analysis.repetition, {"tokens": [1, 2, 3, 1, 2, 3], "n": 3}),
    "scale_sweep": (
        tm.analysis.scale_sweep,
        {"model": MODEL, "prompt": "Hi!", "vectors": FOUND[0], "scales": (1.0,), "layer": 1,
         "chat": False, **SHORT},
    ),
    "transfer": (
        tm.analysis.transfer,
        {"model": MODEL, "vectors": FOUND[0], "prompts": "Hi!", "layer": 1, "chat": False, **SHORT},
    ),
    "cosine_heatmap": (
        tm.plots.cosine_heatmap, {"similarity": torch.eye(3), "title": "x", "labels": None}
    ),
    "objective_history": (tm.plots.objective_history, {"found": FOUND, "title": "x"}),
    "kl_curve": (
        tm.plots.kl_curve,
        {"kl": torch.ones(3), "found": FOUND, "completions": None, "window": 2, "baselines": None,
         "log_y": False, "title": "x"},
    ),
    "norm_curve": (tm.plots.norm_curve, {"found": FOUND, "window": 2, "title": "x"}),
    "moving_average": (tm.plots.moving_average, {"values": np.ones(4), "window": 2}),
    "token_presence": (
        tm.plots.token_presence, {"model": MODEL, "vector": FOUND[0], "text": "Hi you!", "layer": 1}
    ),
    "distance_curve": (
        tm.plots.distance_curve, {"found": FAMILY, "unsteered": 2.0, "window": 2, "title": "x"},
    ),
    "composition_curves": (
        tm.plots.composition_curves, {"composed": COMPOSED, "measure": None, "title": "x"}
    ),
    "scale_curves": (
        tm.plots.scale_curves, {"swept": SWEPT, "changed": 0.5, "repetitive": 0.2, "title": "x"}
    ),
    "presence_points": (
        tm.plots.presence_points, {"scanned": SCANNED, "q": 0.05, "title": "x"}
    ),
    "transfer_heatmap": (tm.plots.transfer_heatmap, {"transferred": TRANSFERRED, "title": "x"}),
    "family": (
        tm.analysis.family,
        {"model": MODEL, "f": MAP, "vectors": FAMILY, "reference": FOUND[0], "prompt": "Hi!",
         "chat": False, "seed": 0, "on_batch": None, **SHORT},
    ),
    "kl_baselines": (
        tm.analysis.kl_baselines,
        {"model": MODEL, "prompt": "Hi!", "vectors": FAMILY, "reference": FOUND[0]},
    ),
    "collect_completions": (
        tm.report.collect_completions,
        {"model": MODEL, "prompts": "Hi!", "found": FOUND, "layer": 1, "chat": False,
         "batch_size": 2, "on_batch": None, **SHORT},
    ),
    "collect_family": (
        tm.report.collect_family,
        {"model": MODEL, "f": MAP, "vectors": FAMILY, "reference": FOUND[0], "sizes": (2,),
         "on_batch": None, **SHORT},
    ),
    "write": (
        tm.report.write,
        {"path": "page.html", "model": MODEL, "found": FOUND, "completions": COMPLETIONS,
         "activation_map": MAP, "families": (), "side_effects": MEASURED, "prompts": None,
         "title": "x", "layer": 1, "chat": False, "batch_size": 2, **SHORT},
    ),
    "calibrate_radius": (
        tm.calibrate_radius,
        {"f": MAP, "criterion": "nonlinearity", "level": 0.5, "positions": slice(-1, None),
         "n_directions": 2, "seed": 0},
    ),
    "divergence": (MAP.divergence, {"theta": torch.ones(1, 32)}),
    "behaviours": (
        tm.analysis.behaviours,
        {"model": MODEL, "completions": COMPLETIONS, "chat": False, "n_behaviours": None,
         "distance": 0.5, "largest_perplexity": 1e9, "largest_repetition": 0.5,
         "embedder": "words", "batch_size": 2},
    ),
    "embeddings": (tm.analysis.embeddings, {"texts": ["Hi you!"], "embedder": "words"}),
    "hit_rate": (
        tm.evaluation.hit_rate,
        {"model": MODEL, "vectors": FOUND, "backdoors": BACKDOORS, "prompts": "Hi!", "layer": 1,
         "chat": False, "similarity": 0.7, "confidence": 0.9, "embedder": "words",
         "batch_size": 2, "max_new_tokens": 16},
    ),
    "count_hits": (
        tm.evaluation.count_hits,
        {"completions": COMPLETIONS, "backdoors": BACKDOORS, "similarity": 0.7,
         "confidence": 0.9, "embedder": "words"},
    ),
    "wilson_interval": (tm.evaluation.wilson_interval, {"hits": 1, "n": 2, "confidence": 0.9}),
    "side_effects": (
        tm.evaluation.side_effects,
        {"model": MODEL, "vectors": FOUND, "prompts": "Hi!", "unrelated": "Bye.",
         "passages": "One two three.", "layer": 1, "chat": False, "batch_size": 2, "on_text": None},
    ),
    "reach": (
        tm.evaluation.reach,
        {"model": MODEL, "vectors": FOUND, "prompt": "Hi!", "prompts": "Bye.", "layer": 1,
         "chat": False, "embedder": "words", **SHORT},
    ),
    "layer_sweep": (
        tm.evaluation.layer_sweep,
        {"model": MODEL, "prompts": "Hi!", "pairs": [(1, 3)], "n_vectors": 1, "radius": 2.0,
         "chat": False, "backdoors": BACKDOORS, "embedder": "words", "on_pair": None, "steps": 1,
         "max_new_tokens": 16},
    ),
    "specificity_points": (tm.plots.specificity_points, {"measured": MEASURED, "title": "x"}),
    "save": (FOUND.save, {"path": "vectors.safetensors"}),
    "Run.melbo": (
        lambda **given: tm.Run(given.pop("folder")).melbo(**given),
        {"folder": "run", "f": MAP, "n_vectors": 1, "progress": False, "overwrite": False,
         "on_vector": None, "radius": 2.0, "steps": 2},
    ),
    "Run.melbo_ortho": (
        lambda **given: tm.Run(given.pop("folder")).melbo_ortho(**given),
        {"folder": "run", "f": MAP, "theta0": FOUND[0], "n_vectors": 1, "progress": False,
         "overwrite": False, "on_vector": None, "norm_penalty": 0.0, "steps": 2},
    ),
    "steered": (
        steer,
        {"model": MODEL, "vectors": FOUND[0], "layer": 1, "scale": 1.0, "positions": slice(None)},
    ),
    "from_tensor": (
        tm.SteeringVectors.from_tensor, {"vectors": torch.ones(2, 32), "source_layer": 1}
    ),
    "concatenate": (tm.concatenate, {"libraries": [FOUND, FOUND]}),
    "getitem": (lambda index: FOUND[index], {"index": 0}),
    "times": (lambda factor: FOUND * factor, {"factor": 2.0}),
    "load": (tm.SteeringVectors.load, {"path": "nowhere.safetensors"}),
    "load_model": (tm.load_model, {"name": "nowhere.gguf", "device": "cpu"}),
}  # fmt: skip
# Not drawn: a model from a hub would wait for a network, and huge numbers of steps for ever.
ENDLESS = {"steps", "n_vectors", "max_new_tokens", "batch_size"}


@pytest.mark.parametrize("hooked", [False, True])
def test_the_calls_work_as_they_are(tmp_path, hooked):
    seen = []
    handles = []
    if hooked:  # somebody's own, which are to stay
        block = MODEL.blocks[0]  # between the layers they would be part of the map
        handles.append(block.register_forward_hook(lambda *_: seen.append("forward")))
        handles.append(block.register_forward_pre_hook(lambda *_: seen.append("before")))
    before = fingerprint(MODEL)
    try:
        for name, (function, arguments) in CALLS.items():
            if name not in ("load", "load_model", "join_family"):
                function(**arguments)
                assert fingerprint(MODEL) == before, name
    finally:
        for handle in handles:
            handle.remove()
    assert bool(seen) == hooked
    clear(tmp_path)


def clear(folder: Path) -> None:
    for item in folder.iterdir():
        shutil.rmtree(item) if item.is_dir() else item.unlink()


@settings(max_examples=500, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_bad_arguments_get_documented_errors(data, tmp_path):
    name = data.draw(st.sampled_from(sorted(CALLS)))
    function, arguments = CALLS[name]
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


@pytest.fixture(autouse=True)
def untouched(tmp_path, monkeypatch):
    """In an empty folder, which must stay so; with a model that must stay as it is."""
    monkeypatch.chdir(tmp_path)
    before, state = fingerprint(MODEL), torch.random.get_rng_state()
    yield
    assert fingerprint(MODEL) == before
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not list(tmp_path.iterdir())
