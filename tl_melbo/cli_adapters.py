"""Divergence adapters from a shell: `tl-melbo adapters --situations --out runs/adapters`."""

from typing import Annotated

import torch
import typer
from typer import Argument, Option

import tl_melbo as tm
from tl_melbo import checks, terminal
from tl_melbo.terminal import BundledModel, Chat, Device, Dtype, Out, option


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
    run = tm.Run(out)
    with run.writing(), terminal.Stages() as stages:
        stages.begin("Loading the model")
        loaded = tm.load_model(model, device=device, dtype=getattr(torch, dtype))
        stages.begin("Training adapters")
        found = run.adapters(
            loaded, n_adapters, prompts or None, on_adapter=stages.count, overwrite=overwrite,
            rank=rank, shared=shared, alpha=alpha, beta=beta, learning_rate=learning_rate,
            length=length, batch_size=batch_size, steps=steps, max_new_tokens=max_new_tokens,
            seed=seed, chat=chat,
        )  # fmt: skip
        stages.begin("Writing under each adapter")
        texts = run.adapter_texts(loaded, found, asked, on_batch=stages.count)
        stages.end()
        stages.stop()
    first = texts[(texts["vector"] >= 0) & (texts["prompt"] == asked[0])]
    terminal.print_adapters(found.table().assign(completion=[*first["completion"]]))
    typer.echo(str((run.folder / "adapters.csv").resolve()))
