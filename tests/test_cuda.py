"""The same on a GPU as on the CPU: f, every search, texts, analyses, adapters, a run, a sweep.

Skipped where there is none; `make test-gpu` runs it where there is one.
"""

import os

import pandas as pd
import pytest
import torch

import tl_melbo as tm
from tests.test_device_map import BLOCKS, REST
from tests.tiny_models import N_LAYERS, tiny_hf, tokenizer
from tl_melbo.cli import app

GPU = os.environ.get("TL_MELBO_TEST_GPU", "cuda")
PROMPT = "Tell me about yourself."
PROMPTS = [PROMPT, "What is the tallest mountain in Africa?"]  # of two lengths
AT = {"source_layer": 1, "target_layer": 4}
SEARCHES = {
    "melbo": lambda f: tm.melbo(f, 3, 2.0),
    "at once": lambda f: tm.melbo(f, 3, 2.0, orthogonal=False),
    "adamw": lambda f: tm.melbo(f, 2, 2.0, optimiser="adamw", steps=20),
    "auto": lambda f: tm.melbo(f, 1, steps=2),
    "ortho": lambda f: tm.melbo_ortho(f, tm.random_vectors(f, 1, 2.0), 2),
    "adam": lambda f: tm.melbo_ortho(
        f, tm.random_vectors(f, 1, 2.0), 1, optimiser="adam", steps=20
    ),
    "random": lambda f: tm.random_vectors(f, 3),
    "jacobian": lambda f: tm.jacobian(f, 3, 2.0),
    "linear": lambda f: tm.dct(f, 4, "linear", radius=2.0),
    "quadratic": lambda f: tm.dct(f, 4, "quadratic", radius=2.0, steps=3),
    "exponential": lambda f: tm.dct(f, 4, radius=2.0, steps=3),
    "soft": lambda f: tm.dct(f, 4, orthogonal="soft", radius=2.0, steps=3),
    "from jacobian": lambda f: tm.dct(f, 4, radius=2.0, steps=3, start="jacobian"),
}
MODELS = ("llama", "gpt2", "gemma3")

pytestmark = pytest.mark.skipif(
    GPU == "cuda" and not torch.cuda.is_available(), reason="needs a CUDA GPU"
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for name in MODELS:
        tiny_hf(name).save_pretrained(folder / name)
        tokenizer().save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="module", params=[*MODELS, "float64"])
def twins(request, folders):
    """A model on the CPU, the same on the GPU, and how near they have to be."""
    name = "gpt2" if request.param == "float64" else request.param  # others' norms are float32
    dtype, near = (torch.float64, 1e-9) if request.param == "float64" else (torch.float32, 1e-5)
    cpu, gpu = (tm.load_model(folders / name, device, dtype) for device in ("cpu", GPU))
    assert next(gpu.parameters()).device.type == GPU
    return cpu, gpu, near


def maps(twins, prompts=PROMPTS):
    return [tm.ActivationMap.from_prompts(model, prompts, **AT) for model in twins[:2]]


def directions(n, seed=0):
    return torch.randn(n, 32, generator=torch.Generator().manual_seed(seed))


def library(n=3):
    return tm.SteeringVectors.from_tensor(directions(n), source_layer=1)


def close(got, expected, near):
    """Relative to the whole tensor, as `f` and its gradient are held to everywhere."""
    difference = (got.cpu().double() - expected.double()).norm()
    assert difference <= near * expected.double().norm()


def same_table(got, expected, near):
    assert list(got.columns) == list(expected.columns)
    pd.testing.assert_frame_equal(
        pd.DataFrame(got), pd.DataFrame(expected), rtol=near, atol=near, check_dtype=False
    )


def test_f_and_its_gradient(twins):
    cpu, gpu = maps(twins)
    assert gpu.x.device.type == GPU
    close(gpu.y, cpu.y, twins[2])
    theta = directions(3).to(cpu.x.dtype)
    values = []
    for f in (cpu, gpu):
        steered = theta.to(f.x.device).requires_grad_()
        objective = tm.melbo_objective(f.delta(steered, positions=slice(-3, None)))
        values += [(objective.detach(), *torch.autograd.grad(objective.sum(), steered))]
    for expected, got in zip(*values, strict=True):
        close(got, expected, twins[2])
    assert not gpu.delta(torch.zeros(1, 32, dtype=gpu.x.dtype)).any()


@pytest.mark.parametrize("search", SEARCHES)
def test_searches(twins, search):
    cpu, gpu = (SEARCHES[search](f) for f in maps(twins))
    assert gpu.vectors.device.type == "cpu"
    # Rounding grows from step to step: in float64 it cannot be seen, in float32 it can.
    close(gpu.vectors, cpu.vectors, 1e-6 if twins[2] < 1e-6 else 2e-2)
    differences = set(gpu.story) ^ set(cpu.story)
    assert not differences, differences


def test_contrastive(twins):
    pairs = [maps(twins, [prompt]) for prompt in PROMPTS]
    cpu, gpu = (tm.contrastive(one, other, radius=2.0) for one, other in zip(*pairs, strict=True))
    close(gpu.vectors, cpu.vectors, 10 * twins[2])


@pytest.mark.parametrize("options", [{}, {"n_samples": 3, "temperature": 1.0}], ids=str)
def test_texts(twins, options):
    with tm.steered(twins[1], library()[0]):
        assert torch.isfinite(twins[1](twins[1].to_tokens(PROMPT))).all()
    cpu, gpu = (
        tm.generate(m, PROMPTS, library(), max_new_tokens=8, scales=(1.0, -1.0), **options)
        for m in twins[:2]
    )
    assert cpu["completion"].nunique() > 1
    assert gpu.equals(cpu)


ANALYSES = {
    "log-probs": lambda m: tm.next_token_log_probs(m, PROMPT, library()),
    "kl": lambda m: tm.analysis.kl_divergence(m, PROMPT, library(), directions(1)),
    "baselines": lambda m: torch.cat(
        [*tm.analysis.kl_baselines(m, PROMPT, library(), directions(1)).values()]
    ),
    "effects": lambda m: tm.analysis.effect_by_layer(m, PROMPT, library()),
    "mechanism": lambda m: tm.analysis.mechanism(m, PROMPT, library(1), 4),
    "top tokens": lambda m: tm.analysis.top_tokens(m, PROMPT, library(), by_layer=True),
    "divergence": lambda m: tm.analysis.token_divergence(
        m, tm.generate(m, PROMPT, library(), max_new_tokens=4), library()
    ),
    "presence": lambda m: tm.analysis.presence(m, library(), PROMPTS, "Once upon a time", seed=1),
    "token direction": lambda m: tm.analysis.token_direction(m, " the"),
    "transfer": lambda m: tm.analysis.transfer(m, library(), PROMPTS, max_new_tokens=3),
    "behaviours": lambda m: (
        tm.analysis.behaviours(
            m, tm.generate(m, PROMPT, library(), max_new_tokens=8), embedder="words"
        ).texts
    ),
    "side effects": lambda m: tm.evaluation.side_effects(m, library(1), PROMPT),
    "reach": lambda m: tm.evaluation.reach(
        m, library(2), PROMPT, PROMPTS[1:], max_new_tokens=4, embedder="words"
    ),
    "sweep of scales": lambda m: tm.analysis.scale_sweep(m, PROMPT, library(1), max_new_tokens=4),
}


@pytest.mark.parametrize("analysis", ANALYSES)
def test_analyses(twins, analysis):
    cpu, gpu = (ANALYSES[analysis](m) for m in twins[:2])
    if isinstance(cpu, torch.Tensor):
        close(gpu, cpu, 100 * twins[2])
    else:
        same_table(gpu, cpu, 1e-3 if twins[2] > 1e-6 else 1e-6)


def test_analyses_of_f(twins):
    results = []
    for model, f in zip(twins[:2], maps(twins, PROMPT), strict=True):
        family = tm.melbo_ortho(f, directions(1), 2, steps=3)
        table = tm.analysis.family(model, f, library(), directions(1), max_new_tokens=3)
        mixed = tm.analysis.composition(model, f, library(), sizes=(2,), max_new_tokens=3)
        distance = tm.analysis.effect_distance(f, library(), directions(1))
        cosines = tm.analysis.cosine_similarity(f.delta(library().vectors))
        results.append((family.vectors, table, mixed, distance, cosines.cpu()))
    for expected, got in zip(*results, strict=True):
        if isinstance(expected, torch.Tensor):
            close(got, expected, 2e-2 if twins[2] > 1e-6 else 1e-6)
        else:
            same_table(got, expected, 2e-2 if twins[2] > 1e-6 else 1e-6)


def test_ablation(twins):
    tokens = twins[0].to_tokens(PROMPT)
    logits = []
    for model in twins[:2]:
        with tm.ablated(model, library()), torch.no_grad():
            logits.append(model(tokens.to(next(model.parameters()).device)))
    close(logits[1], logits[0], 10 * twins[2])


def test_adapters_and_gated_factors(twins):
    quick = {"max_new_tokens": 3, "steps": 2, "batch_size": 2}
    cpu, gpu = (tm.divergence_adapter(m, PROMPTS, 2, **quick) for m in twins[:2])
    close(gpu.A, cpu.A, 1e-3)
    close(gpu.B, cpu.B, 1e-3)
    quick = {"layers": [0, 1], "target_layer": 3, "steps": 3}
    gated = [tm.gated_factors(m, PROMPTS, 3, **quick) for m in twins[:2]]
    close(gated[1].A, gated[0].A, 1e-3)
    close(gated[1].B, gated[0].B, 1e-3)
    for steering in (cpu, gated[0]):
        texts = [tm.generate(m, PROMPT, steering, max_new_tokens=4) for m in twins[:2]]
        assert texts[1].equals(texts[0])


def test_atlas(twins):
    quick = {"sources": [1, 2], "targets": [3, 5], "chat": False, "max_new_tokens": 3}
    cpu, gpu = (tm.evaluation.atlas(m, PROMPT, **quick) for m in twins[:2])
    for layer, found in cpu.libraries.items():
        close(gpu.libraries[layer].vectors.abs(), found.vectors.abs(), 1e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(folders, dtype):
    model = tm.load_model(folders / "gemma3", GPU, dtype)
    f = tm.ActivationMap.from_prompts(model, PROMPT, **AT)
    found = tm.melbo(f, 2, 2.0, steps=4)
    assert torch.isfinite(found.columns["objective"]).all()
    torch.testing.assert_close(found.vectors.norm(dim=-1), torch.full((2,), 2.0))
    assert len(tm.generate(model, PROMPT, found, max_new_tokens=4)) == 2


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_blocks_on_two_devices(folders, architecture):
    places = {BLOCKS[architecture].format(i): (0 if i % 2 else "cpu") for i in range(N_LAYERS)}
    places |= dict.fromkeys(REST[architecture], 0)
    whole = tm.load_model(folders / architecture, "cpu")
    spread = tm.load_model(folders / architecture, device_map=places)
    maps = [tm.ActivationMap.from_prompts(m, PROMPTS, **AT) for m in (whole, spread)]
    found, same = (tm.melbo(f, 3, 2.0, steps=3) for f in maps)
    close(same.vectors, found.vectors, 1e-3)
    texts = [tm.generate(m, PROMPTS, found, max_new_tokens=5) for m in (whole, spread)]
    assert texts[1].equals(texts[0])
    auto = tm.load_model(folders / architecture, device_map="auto")
    found = tm.melbo(tm.ActivationMap.from_prompts(auto, PROMPTS, **AT), 3, 2.0, steps=3)
    close(found.vectors, same.vectors, 1e-3)


def command(*arguments):
    with pytest.raises(SystemExit) as ended:
        app([str(argument) for argument in arguments])
    assert ended.value.code == 0


@pytest.mark.usefixtures("by_words")
def test_a_run_from_the_shell_and_its_page(folders, tmp_path):
    layers = ("--source-layer", 1, "--target-layer", 4)
    search = ("--model", folders / "llama", *layers, "--n-vectors", 3, "--max-new-tokens", 4)
    command("discover", PROMPT, *search, "--device", GPU, "--samples", 2, "--out", tmp_path / "run")
    assert "vectors.safetensors" in {path.name for path in (tmp_path / "run").iterdir()}
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert PROMPT in page
    # Begun on the CPU, ended on the GPU: told, and what was found stays.
    command("discover", PROMPT, *search, "--device", "cpu", "--out", tmp_path / "moved")
    before = tm.SteeringVectors.load(tmp_path / "moved" / "vectors.safetensors")
    more = [*search[:-3], 4, *search[-2:]]
    command("discover", PROMPT, *more, "--device", GPU, "--out", tmp_path / "moved")
    after = tm.SteeringVectors.load(tmp_path / "moved" / "vectors.safetensors")
    assert torch.equal(after.vectors[:3], before.vectors)
    assert len(after) == 4


def test_a_sweep(folders, tmp_path):
    grid = {
        "model": str(folders / "llama"), "prompt": PROMPT, "n_vectors": 2, "radius": [1.0, 2.0],
        "source_layer": 1, "target_layer": 4, "max_new_tokens": 3,
    }  # fmt: skip
    cpu, gpu = (tm.sweep(grid, tmp_path / str(i), device=d) for i, d in enumerate(("cpu", GPU)))
    assert gpu["status"].eq("done").all(), gpu["error"].tolist()
    assert len(gpu) == len(cpu) == 2
