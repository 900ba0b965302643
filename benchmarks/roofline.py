"""How near the matrix rate f, its gradient, and a search of many factors come."""

import statistics
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

import tl_melbo as tm
from benchmarks.timing import peak_memory, seconds, square_product
from tl_melbo.geometry import random_sphere

ALL, RADIUS = slice(None), 12.0
Row = tuple[str, str]


def roofline_rows(model: Any, f: tm.ActivationMap) -> Iterator[Row]:
    """Floating-point operations of f and its gradient, per second, over the matrix rate.

    Per token and block 2 (2 d^2 + 2 d d_kv + 3 d d_mlp) for the weights and 4 n d for the attention
    pattern; as much again for the gradient, which is of theta alone.
    """
    config = model.original_model.config
    d, n_tokens, n_blocks = f.d_model, f.x.shape[1], f.target_layer - f.source_layer
    d_kv = d * config.num_key_value_heads // config.num_attention_heads
    weights = 2 * d * d + 2 * d * d_kv + 3 * d * config.intermediate_size
    operations = 2 * n_blocks * n_tokens * (2 * weights + 4 * n_tokens * d)
    yield "GFLOP, one vector", f"{operations / 1e9:.2f}"
    product, product_operations = square_product()
    for n_vectors in (1, 8, 32, 128):
        theta = random_sphere(
            n_vectors, d, RADIUS, generator=torch.Generator().manual_seed(0)
        ).requires_grad_()

        def gradient(theta: torch.Tensor = theta, positions: slice = ALL) -> None:
            torch.autograd.grad(f.delta(theta, positions).square().sum(), theta)

        gradient()
        memory = peak_memory(gradient)
        taken, last_three, of_product = seconds(
            gradient,
            lambda gradient=gradient: gradient(positions=slice(-3, None)),
            product,
            repeats=15 if n_vectors < 32 else 7,
        )
        rate, machine = n_vectors * operations / taken, product_operations / of_product
        yield (
            f"{n_vectors} vectors: f and gradient",
            f"{taken:.3f} s, {rate / 1e9:.0f} of {machine / 1e9:.0f} GFLOP/s, "
            f"**{rate / machine:.0%}**, {memory / 2**20:.0f} MiB more at its peak",
        )
        yield f"{n_vectors} vectors, effect at the last three positions", f"{last_three:.3f} s"


def dct_rows(model: Any, f: tm.ActivationMap) -> Iterator[Row]:
    """The products in 30 steps of 128 exponential factors, per second, over the matrix rate."""
    n_factors, steps, size, last_three = 128, 30, 32, slice(-3, None)
    theta = random_sphere(size, f.d_model, RADIUS, generator=torch.Generator().manual_seed(0))
    theta.requires_grad_()
    with FlopCounterMode(display=False) as counter:
        torch.autograd.grad(f.delta(theta, last_three).square().sum(), theta)
    operations = counter.get_total_flops() / size * n_factors * steps
    product, product_operations = square_product()
    # Each step beside a product: a slow minute of the machine hits both.
    products: list[float] = []

    def on_step(step: int, objective: float) -> None:
        start = time.perf_counter()
        product()
        products.append(time.perf_counter() - start)

    product()
    start = time.perf_counter()
    tm.dct(f, n_factors, radius=RADIUS, positions=last_three, steps=steps, on_step=on_step)
    taken = time.perf_counter() - start - sum(products)
    rate, machine = operations / taken, product_operations / statistics.median(products)
    yield (
        f"{n_factors} factors, {steps} steps: TFLOP in f and its gradient",
        f"{operations / 1e12:.1f}",
    )
    yield (
        "the whole search",
        f"{taken:.0f} s, {rate / 1e9:.0f} of {machine / 1e9:.0f} GFLOP/s, **{rate / machine:.0%}**",
    )
