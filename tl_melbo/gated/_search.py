"""Find gated factors: soft factors of deep causal transcoding, on rank-one additions to attention.

Source: "Mechanistically eliciting latent behaviors in language models", arXiv 2606.29604, 2026,
read through notes on it and a port of it.
"""

import functools
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from torch import Tensor
from tqdm.auto import tqdm

from tl_melbo import checks, story
from tl_melbo.activation_map import ActivationMap
from tl_melbo.discovery._dct_fit import MEASURE, Factors, Fit, Stage
from tl_melbo.discovery._search import Parts, collecting
from tl_melbo.errors import NotFinite, told
from tl_melbo.gated._factors import UNFINISHED, GatedAdditions, GatedFactors
from tl_melbo.memory import map_batches
from tl_melbo.model.bridge import (
    Model,
    check_layer,
    check_model,
    check_projection,
    frozen,
    hook_points,
    model_name,
)
from tl_melbo.replay import Group, push, run_layers
from tl_melbo.shapes import Delta, checked_slice
from tl_melbo.steering import hooked


class GatedMap:
    """From factors, each flattened to one vector of norm 1, to their effects: an `EffectMap`.

    A factor's part of each block is (a, b), one after the other, each of norm 1 / sqrt(2 blocks).
    """

    def __init__(self, f: ActivationMap, layers: Sequence[int], radius: float) -> None:
        self.f, self.layers, self.radius = f, layers, radius
        self.x, self.mask, self.vectors_at_once = f.x, f.mask, f.vectors_at_once
        self.position_mask, self.resolution = f.position_mask, f.resolution
        widths: set[int] = set()
        with self._seen(lambda _, z: widths.add(z.shape[-1])):
            f._hooked(f.x)
        if len(widths) > 1:
            raise ValueError(
                f"layers={list(layers)}: attention of these blocks is {sorted(widths)} wide; pass "
                "blocks of one width"
            )
        self.widths = widths.pop(), f.d_model  # of a and b

    @property
    def size(self) -> int:
        """How many numbers a factor has."""
        return len(self.layers) * sum(self.widths)

    def story(self) -> dict[str, Any]:
        """Where the map comes from; its factors belong to blocks, not to one source layer."""
        return {name: fact for name, fact in self.f.story().items() if name != "source_layer"}

    def parts(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """The a and the b of flattened factors, [factor, layer, width]."""
        of_block = theta.unflatten(1, (len(self.layers), -1))
        return of_block[..., : self.widths[0]], of_block[..., self.widths[0] :]

    def unit(self, theta: Tensor) -> Tensor:
        """Every a and b at its norm; zero stays zero."""
        scaled = []
        for part in self.parts(theta):
            norm = part.norm(dim=-1, keepdim=True) * math.sqrt(2 * len(self.layers))
            scaled.append(torch.where(norm == 0, part, part / norm))
        return torch.cat(scaled, -1).flatten(1)

    def additions(self, theta: Tensor) -> GatedAdditions:
        """What flattened factors add; gradients flow."""
        scale = math.sqrt(2 * len(self.layers))
        A, B = (part * scale for part in self.parts(theta))
        return GatedAdditions(A, B, A.new_full((len(A),), self.radius), self.layers)

    def delta(self, theta: Tensor, positions: slice = slice(None)) -> Delta:
        """The effects on the target layer, with the factors at every position."""
        f, rows = self.f, self.additions(theta)
        picked = f._picked(checked_slice(positions))

        def run(stream: Tensor, group: Group, wanted: Tensor | None, _: bool) -> Tensor:
            # One row for each factor and prompt, the prompts of a factor together.
            each = torch.arange(len(rows)).repeat_interleave(len(stream) // len(rows))
            with frozen(*f._blocks()), hooked(f.model, rows[each.to(theta.device)]):
                return run_layers(f._blocks(), group.calls, stream, wanted)

        y = push(f.x.expand(len(rows), *f.x.shape), f._groups, picked, run)
        wide = torch.promote_types(theta.dtype, f.x.dtype)
        return (y.to(wide) - f.y.to(wide)) * picked.mask[:, :, None]

    @torch.no_grad()
    def mean_gates(self, theta: Tensor) -> Tensor:
        """The mean of z . a over all tokens of the prompts, under the factor, [factor, layer]."""

        def of_batch(batch: Tensor) -> Tensor:
            rows = self.additions(batch)
            sums = {layer: torch.zeros(len(rows), dtype=torch.float64) for layer in self.layers}

            def see(layer: int, z: Tensor) -> None:
                of_factor = z.unflatten(0, (len(rows), -1)).flatten(1, 2)
                sums[layer] += rows.gates(layer, of_factor).double().sum(1).cpu()

            with self._seen(see):
                self.delta(batch)
            return torch.stack([*sums.values()], 1) / int(self.f.mask.sum())

        theta = theta.to(self.x.device, torch.promote_types(self.x.dtype, torch.float32))
        return torch.cat(map_batches(of_batch, theta, self.vectors_at_once(False))[0])

    @contextmanager
    def _seen(self, see: Callable[[int, Tensor], None]) -> Iterator[None]:
        """`see` gets the number of each block and what its output projection multiplies."""
        with ExitStack() as hooks:
            for layer in self.layers:
                point, _ = hook_points(self.f.model, layer, GatedAdditions.place)

                def hook(module: Any, args: Any, z: Tensor, layer: int = layer) -> None:
                    see(layer, z)

                hooks.enter_context(point.register_forward_hook(hook))
            yield


class FactorSearch(Parts[GatedFactors]):
    """A search that yields all factors after each of its steps; the last are what it finds.

    It goes on after `begun`, where that is set before the first step.
    """

    begun: GatedFactors | None = None

    def __init__(
        self, made: dict[str, Any], gated: GatedMap, positions: slice, start: Tensor, progress: bool
    ) -> None:
        super().__init__(made, self._run())
        self.gated, self.positions, self.start, self.progress = gated, positions, start, progress
        self.n_steps = made["hyperparameters"]["steps"] + 1

    def collect(self) -> GatedFactors:
        """What is found."""
        if not (last := deque(self, maxlen=1)):
            raise ValueError("this search has given all its steps; call gated_factors anew")
        return last.pop()

    def _run(self) -> Iterator[GatedFactors]:
        gated, begun, stage = self.gated, self.begun, cast(Any, None)
        shown = {"desc": "gated factors", "unit": "step", "disable": not self.progress}
        with tqdm(total=self.n_steps, **shown) as bar:
            fit = Fit(gated, self.positions, 1.0, lambda *_: bar.update(), unit=gated.unit)
            if begun is not None:
                if UNFINISHED not in begun.columns or begun.history is None:  # it has ended
                    return
                kept = begun.columns[UNFINISHED].unbind(1)
                inputs, towards, pulls = (part.contiguous() for part in kept)
                known, _, _ = fit.fitted("exponential", inputs)
                stage = Stage(known, towards, pulls, begun.history)
                bar.update(begun.history.shape[1])
            start = gated.unit(self.start.double())
            stages = fit.stages("exponential", start, self.n_steps - 1, True, 0, stage)
            for stage in stages:
                rows = gated.additions(_check_finite(stage.factors).inputs)
                kept = torch.stack([stage.factors.inputs, stage.towards, stage.gradients], 1)
                columns = {"importance": stage.factors.importance, UNFINISHED: kept}
                options: Any = {"columns": columns, "history": stage.history}
                yield GatedFactors(rows.A, rows.B, story=self.story, **options)
            found, history = fit.finished("exponential", stage, True)
        inputs, columns, history = _check_finite(found).ordered(history)
        gates, rows = gated.mean_gates(inputs).float(), gated.additions(inputs)
        columns["mean_gate"] = gates.abs()
        # (-a, -b) adds what (a, b) adds: of the two, the one that is open on average.
        signs = torch.where(gates < 0, -1.0, 1.0)[:, :, None]
        options = {"columns": columns, "history": history}
        yield GatedFactors(rows.A * signs, rows.B * signs, story=self.story, **options)


@functools.partial(collecting, kind=GatedFactors)
def gated_factors(
    model: Model,
    prompts: str | Sequence[str],
    n_factors: int = 64,
    *,
    layers: Sequence[int] | None = None,
    target_layer: int | None = None,
    positions: slice = slice(-3, None),
    radius: float = 1.0,
    steps: int = 30,
    seed: int = 0,
    chat: bool = False,
    batch_size: int | None = None,
    progress: bool = False,
) -> FactorSearch:
    """Find factors: steering vectors of a band of early blocks, each with an input gate.

    A factor adds R (z . a) b to attention's output projection of each block of the band, where z is
    what that projection multiplies. The factors are those of soft exponential `dct`: each step sets
    every a and b to where the effect's own direction grows, and pushes apart factors that are alike
    and strong. All numbers of a factor count as one vector there; each a and b keeps norm 1.

    Args:
        n_factors: how many; two push each other to the same factor, and few push each other far.
        layers: the band; None takes the first third of the model's blocks.
        target_layer: where the effect is measured; None takes half of the blocks, or the block
            after the band where that is later.
        positions: where the effect is measured, counted on each prompt's own tokens. The factors
            are added at all.
        radius: R.
        chat: format each prompt as a user's turn with the tokenizer's chat template.
        batch_size: factors at a time; None picks what fits in memory.

    Returns:
        The factors, the most important first, with the columns that `GatedFactors` names.

    Raises:
        ValueError: an unknown block, a target at or before the last of the band, a number out of
            its range, positions that some prompt does not have, a radius without effect; a model
            whose attention has no hook points for it, such as a HookedTransformer.
        NotFinite: the effect or its derivative is not finite.

    Source: arXiv 2606.29604 (2026), "Mechanistically eliciting latent behaviors in language
    models", read through notes on it and a port of it.
    """
    check_model(model)
    checks.at_least(1, n_factors=n_factors, steps=steps, batch_size=batch_size)
    checks.positive(radius=radius)
    checks.seed(seed)
    band, target = _band(model, layers, target_layer)
    f = ActivationMap._hooked_between(model, prompts, chat, band[0] - 1, target, batch_size)
    gated = GatedMap(f, band, radius)
    drawn = torch.Generator().manual_seed(seed)
    start = torch.randn(n_factors, gated.size, generator=drawn, dtype=torch.float32)
    positions = checked_slice(positions)
    made = story.make(
        "gated_factors",
        **gated.story(),
        layers=band,
        seed=seed,
        hyperparameters={
            "radius": radius,
            "positions": story.slice_to_json(positions),
            "n_factors": n_factors,
            "layers": band,
            "steps": steps,
        },
        measure=MEASURE,
        about="Each factor is a steering vector in attention of several blocks, with a gate that "
        "each token sets; all were found together, as soft factors of the effect.",
    )
    return FactorSearch(made, gated, positions, start, progress)


def _band(model: Model, layers: Sequence[int] | None, target: int | None) -> tuple[list[int], int]:
    """The blocks of the factors, in order, and the target layer."""
    n_layers = int(model.cfg.n_layers)
    band = sorted(range(max(1, n_layers // 3)) if layers is None else layers)
    for layer in band:
        check_layer(model, layer, "layers")
        check_projection(model, layer)
    if not band or len({*band}) < len(band):
        raise ValueError(f"layers={band}: numbers of blocks, each once")
    target = max(n_layers // 2, band[-1] + 1) if target is None else target
    if not band[-1] < target < n_layers:
        raise ValueError(
            f"target_layer={target}: {model_name(model)} has {n_layers} layers and the band ends "
            f"at {band[-1]}, so allowed are {band[-1] + 1} to {n_layers - 1}; pass earlier layers "
            "or a later target_layer"
        )
    return band, target


def _check_finite(found: Factors) -> Factors:
    parts = (found.inputs, found.importance[:, None], found.mean_effect)
    good = torch.stack([part.isfinite().all(-1) for part in parts]).all(0)
    if not good.all():
        bad = (~good).nonzero().flatten().tolist()
        raise NotFinite(
            f"factors {told(bad)}: their effect or its derivative is not finite; use a smaller "
            "radius, or load the model in a wider type, such as dtype=torch.float32",
            bad,
        )
    return found
