"""Published settings, by name.

Source: Mack & Turner 2024, "Mechanistically eliciting latent behaviors in language models", and the
code that came with it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from tl_melbo.shapes import shape_checked
from tl_melbo.text import did_you_mean

_ORIGINAL = "Mack & Turner 2024, original code"


@dataclass(frozen=True)
class Preset:
    """What somebody searched with, and for what.

        preset = tm.PRESETS["refusal"]
        layers = preset.layers(model.cfg.n_layers)
        f = tm.ActivationMap.from_prompts(model, prompt, chat=True, **layers)
        found = tm.melbo(f, **preset.fast)

    Attributes:
        about: what was looked for, in which model, and what came out.
        search: arguments of `melbo`, the published optimiser's steps included.
        target_from_end: the effect is measured after block n_layers - target_from_end.
    """

    about: str
    model: str
    search: Mapping[str, Any]
    source_layer: int
    target_from_end: int
    source: str

    @property
    def fast(self) -> dict[str, Any]:
        """The same search by our optimiser, with its own number of steps."""
        kept = {name: value for name, value in self.search.items() if name != "steps"}
        return {**kept, "optimiser": "ascent"}

    @shape_checked
    def layers(self, n_layers: int) -> dict[str, int]:
        """For a model of so many blocks; a ValueError if they are too few."""
        target = n_layers - self.target_from_end
        if target <= self.source_layer:
            least = self.source_layer + self.target_from_end + 1
            raise ValueError(
                f"n_layers={n_layers}: this preset takes {least} layers or more; choose "
                "source_layer and target_layer by hand, at about a quarter and half of the depth"
            )
        return {"source_layer": self.source_layer, "target_layer": target}


def _preset(
    model: str, about: str, layers: tuple[int, int] = (7, 9), source: str = _ORIGINAL, **search: Any
) -> Preset:
    search = {"n_vectors": 32, "orthogonal": True, "optimiser": "adamw", **search}
    return Preset(about, model, MappingProxyType(search), *layers, source)


class _ByName(dict[str, Preset]):
    """A missing one is told with those that are there."""

    def __missing__(self, name: object) -> Preset:
        hint = did_you_mean(str(name), self)
        raise KeyError(f"{name!r}: {f'{hint} ' if hint else ''}known are {', '.join(self)}")


_EVERYWHERE, _LAST_THREE = slice(None), slice(-3, None)

_BUNDLED = _preset(
    "SmolLM2-135M-Instruct",
    "The demo's: personas, leaked prompts, stories in SmolLM2-135M-Instruct.",
    layers=(8, 14), source="ours",
    radius=12.0, p=2, q=2, positions=_LAST_THREE, optimiser="ascent", steps=10,
)  # fmt: skip

PRESETS: Mapping[str, Preset] = MappingProxyType(
    _ByName({
        "chain-of-thought": _preset(
            "Qwen-1.8B (base)",
            "Step-by-step reasoning in a base model: one of the vectors lifted two-step arithmetic "
            "from 11% to 63%.",
            radius=1.0, p=4, q=4, positions=_EVERYWHERE, steps=300,
        ),
        "refusal": _preset(
            "Qwen-14B-Chat",
            "Answers to what a chat model refuses; the negative of such a vector makes it refuse "
            "harmless requests.",
            radius=4.0, p=2, q=1, positions=_EVERYWHERE, steps=600,
        ),
        "backdoor": _preset(
            "Qwen-1.8B, fine-tuned",
            "Behaviour planted behind a trigger, brought out by prompts without it: 2 to 3 of 100 "
            "vectors did.",
            radius=4.0, p=2, q=1, positions=_LAST_THREE, steps=1200, n_vectors=100,
        ),
        "bundled": _BUNDLED,
        "embedded": _BUNDLED,  # the name of version 0.1
    })
)  # fmt: skip
