"""What one GPU takes for a gradient, a search and texts. No GPU has run it yet.

    python -m benchmarks.gpu [--blocks-of-70b 24]     # on a GPU of 80 GB or more

The models have the shapes of real ones and random weights: no time hangs on what a weight is. Each
number is one line of benchmarks/gpu.csv, to lay beside what benchmarks.scale calculates.
"""

import argparse
import gc
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import tl_melbo as tm
from benchmarks.scale import BUNDLED, GB, LARGE, N_NEW_TOKENS, N_TOKENS, Shape
from benchmarks.tables import markdown
from benchmarks.timing import seconds
from tests.tiny_models import tokenizer
from tl_melbo.geometry import random_sphere

KEPT = Path(__file__).with_suffix(".csv")
OF_8B = Shape("a Llama of 8B", 32, 4096, 14336, 1024, 128256)
N_TEXTS, N_VECTORS, LAST_THREE = 64, (1, 8, 32, 128), slice(-3, None)
Row = tuple[str, float, str]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--blocks-of-70b", default=24, type=int, metavar="N", help="blocks (24)")
    chosen = parser.parse_args()
    part = LARGE._replace(
        name=f"{chosen.blocks_of_70b} blocks of 70B", n_layers=chosen.blocks_of_70b
    )
    rows = [("", *row) for row in ceilings()]
    for shape, layers in ((BUNDLED, (8, 16)), (OF_8B, (8, 16)), (part, (2, 22))):
        rows += [(shape.name, *row) for row in of_model(shape, layers)]
        gc.collect()
        torch.cuda.empty_cache()
    table = pd.DataFrame(rows, columns=["model", "what", "value", "unit"])
    table.to_csv(KEPT, index=False)
    print(markdown(table.astype(str)))


def ceilings() -> Iterator[Row]:
    """What the machine can do: a large product, and a large array read once and written once."""
    yield f"{torch.cuda.get_device_name()}, torch {torch.__version__}", 1, "device"
    for dtype in (torch.bfloat16, torch.float32):
        a = torch.randn(8192, 8192, device="cuda", dtype=dtype)
        took = median(lambda a=a: a @ a)
        yield f"product of 8192, {dtype}", 2 * 8192**3 / took / 1e12, "TFLOP/s"
    a = torch.randn(2**31, device="cuda", dtype=torch.bfloat16)
    yield "copy, read and written", 2 * a.nbytes / median(a.clone) / 1e12, "TB/s"


def of_model(shape: Shape, layers: tuple[int, int]) -> Iterator[Row]:
    began = time.monotonic()
    model = random_model(shape)
    prompt = "a"
    while model.to_tokens(prompt).shape[1] < N_TOKENS:
        prompt += " a"
    f = tm.ActivationMap.from_prompts(model, prompt, *layers)
    yield "prompt", f.x.shape[1], "tokens"
    yield "made, f with it", time.monotonic() - began, "s"
    for n_vectors in N_VECTORS:
        generator = torch.Generator().manual_seed(0)
        theta = random_sphere(n_vectors, f.d_model, 12.0, generator=generator)
        steered = theta.to(f.x).requires_grad_()

        def gradient(steered: torch.Tensor = steered) -> None:
            torch.autograd.grad(f.delta(steered, LAST_THREE).float().square().sum(), steered)

        torch.cuda.reset_peak_memory_stats()
        yield f"gradient, {n_vectors} at once", 1e3 * median(gradient), "ms"
        yield f"memory, {n_vectors} at once", torch.cuda.max_memory_allocated() / GB, "GB"
    tm.melbo(f, 1, 12.0, steps=2)
    began = time.monotonic()
    found = tm.melbo(f, 8, 12.0)
    gradients = float(found.columns["evaluations"].sum())
    yield "search of 8, a gradient", 1e3 * (time.monotonic() - began) / gradients, "ms"
    began = time.monotonic()
    tm.dct(f, 64, radius=12.0, steps=10)
    yield "64 factors, 10 steps", time.monotonic() - began, "s"
    vectors = tm.random_vectors(f, N_TEXTS, 12.0)
    write = {"max_new_tokens": N_NEW_TOKENS, "chat": False}
    tm.generate(model, prompt, vectors[:1], max_new_tokens=4, chat=False)
    began = time.monotonic()
    texts = tm.generate(model, prompt, vectors, **write)
    yield f"{len(texts)} texts of {N_NEW_TOKENS} tokens", time.monotonic() - began, "s"


def random_model(shape: Shape) -> Any:
    from transformer_lens.model_bridge import TransformerBridge

    n_heads = max(1, shape.d_model // (64 if shape.d_model < 4096 else 128))
    config = LlamaConfig(
        vocab_size=shape.d_vocab,
        hidden_size=shape.d_model,
        intermediate_size=shape.d_mlp,
        num_hidden_layers=shape.n_layers,
        num_attention_heads=n_heads,
        num_key_value_heads=n_heads * shape.d_kv // shape.d_model,
        max_position_embeddings=2048,
    )
    config.architectures = ["LlamaForCausalLM"]
    dtype = {2: torch.bfloat16, 4: torch.float32}[shape.bytes_each]
    with torch.device("cuda"):
        hf_model = LlamaForCausalLM._from_config(config, dtype=dtype).eval()
    # Texts are to be as long as asked for.
    hf_model.generation_config.eos_token_id = hf_model.config.eos_token_id = None
    return TransformerBridge.boot_transformers(
        shape.name, hf_model=hf_model, tokenizer=tokenizer(), device="cuda", dtype=dtype
    )


def median(function: Callable[[], Any]) -> float:
    function()
    torch.cuda.synchronize()
    return seconds(function, repeats=9)[0]


if __name__ == "__main__":
    main()
