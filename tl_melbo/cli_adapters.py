"""Adapters and gated factors from a shell: `tl-melbo adapters --situations --out runs/adapters`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer
from typer import Argument, Option

import tl_melbo as tm
from tl_melbo import checks, terminal
from tl_melbo.terminal import BundledModel, Chat, Device, Dtype, MaxNewTokens, Out, Prompts, option

if TYPE_CHECKING:
    import pandas as pd


def adapters(
    out: Out,
    prompts: Annotated[
        list[str] | None, Argument(help="What is continued; none with --situations.")
    ] = None,
    situations: Annotated[
        bool, Option("--situations", help="Take the prompts that come with the package.")
    ] = False,
    n_adapters: Annotated[int, option("How many to train.")] = 8,
    rank: Annotated[int, option("Of each adapter.")] = 2,
    shared: Annotated[
        bool, Option("--shared/--per-block", help="One pair of matrices for all blocks.")
    ] = True,
    alpha: Annotated[float, option("Weight of the divergence.")] = 1.1,
    beta: Annotated[float, option("Weight of the negative log-likelihood.")] = 0.3,
    learning_rate: Annotated[float, option("Of AdamW.")] = 0.1,
    length: Annotated[float, option("Of what is added after each block.")] = 2.0,
    batch_size: Annotated[int, option("Prompts a step.")] = 12,
    steps: Annotated[int | None, option("Of the optimiser.", "once through the prompts")] = None,
    max_new_tokens: Annotated[int, option("Tokens sampled after each prompt.")] = 128,
    seed: Annotated[int, option("Of starts, order and samples.")] = 0,
    chat: Chat = False,
    model: BundledModel = None,
    device: Device = None,
    dtype: Dtype = "float32",
    overwrite: Annotated[bool, option("Replace earlier adapters in --out.")] = False,
) -> None:
    """Train adapters under which the model writes something else, without saying what.

    Writes adapters.safetensors, and adapters.csv with texts under each; prints the path of the
    texts last. Every adapter is kept as soon as it is trained, and the same command goes on.
    """
    if situations == bool(prompts):
        raise ValueError("prompts: pass some, or --situations, and not both")
    checks.at_least(1, n_adapters=n_adapters, max_new_tokens=max_new_tokens)
    held_out = tm.adapters.situations().query("split == 'held_out'").groupby("situation").head(1)
    asked = [checks.as_text(prompt) for prompt in prompts or held_out["prompt"]]
    chosen: dict[str, Any] = {
        "rank": rank, "shared": shared, "alpha": alpha, "beta": beta,
        "learning_rate": learning_rate, "length": length, "batch_size": batch_size, "steps": steps,
        "max_new_tokens": max_new_tokens, "seed": seed, "chat": chat, "overwrite": overwrite,
    }  # fmt: skip

    def train(run: tm.Run, loaded: Any, count: Any) -> tm.Adapter:
        return run.adapters(loaded, n_adapters, prompts or None, on_adapter=count, **chosen)

    load = {"name": model, "device": device, "dtype": getattr(torch, dtype)}
    terminal.print_adapters(_kept("adapter", "Training adapters", out, asked, 50, train, load))
    typer.echo(str((out / "adapters.csv").expanduser().resolve()))


def gated(
    prompts: Prompts,
    out: Out,
    n_factors: Annotated[int, option("How many; they are found together.")] = 64,
    layers: Annotated[list[int] | None, option("Of the band; repeatable.", "first third")] = None,
    target_layer: Annotated[int | None, option("Measure effects after it.", "the middle")] = None,
    radius: Annotated[float, option("R, which multiplies what they add.")] = 1.0,
    steps: Annotated[int, option("Of the search.")] = 30,
    seed: Annotated[int, option("Of the random start.")] = 0,
    chat: Chat = True,
    max_new_tokens: MaxNewTokens = 50,
    model: BundledModel = None,
    device: Device = None,
    dtype: Dtype = "float32",
    overwrite: Annotated[bool, option("Replace earlier factors in --out.")] = False,
) -> None:
    """Find gated factors: vectors of a band of blocks, whose length each token decides.

    Writes factors.safetensors, and factors.csv with texts under each; prints the path of the texts
    last. Every step is kept, and the same command goes on.
    """
    asked = checks.as_texts(prompts)
    checks.at_least(1, n_factors=n_factors, steps=steps, max_new_tokens=max_new_tokens)
    chosen: dict[str, Any] = {
        "layers": layers, "target_layer": target_layer, "radius": radius, "steps": steps,
        "seed": seed, "chat": chat, "overwrite": overwrite,
    }  # fmt: skip

    def find(run: tm.Run, loaded: Any, count: Any) -> tm.GatedFactors:
        return run.gated_factors(loaded, prompts, n_factors, on_step=count, **chosen)

    load = {"name": model, "device": device, "dtype": getattr(torch, dtype)}
    table = _kept("factor", "Finding factors", out, asked, max_new_tokens, find, load)
    terminal.print_factors(table)
    typer.echo(str((out / "factors.csv").expanduser().resolve()))


def _kept(
    what: str, doing: str, out: Path, asked: list[str], length: int, find: Any, load: Any
) -> "pd.DataFrame":
    """Find what a folder keeps, and write under each; the table, with the first texts."""
    run, asked = tm.Run(out), [*dict.fromkeys(asked)]  # one text is written once
    with run.writing(), terminal.Stages() as stages:
        stages.begin("Loading the model")
        loaded = tm.load_model(**load)
        stages.begin(doing)
        found = find(run, loaded, stages.count)
        stages.begin(f"Writing under each {what}")
        texts = run.adapter_texts(loaded, found, asked, length, on_batch=stages.count)
        stages.end()
        stages.stop()
    first = texts[(texts["vector"] >= 0) & (texts["prompt"] == asked[0])]
    return found.table().assign(completion=[*first["completion"]])
