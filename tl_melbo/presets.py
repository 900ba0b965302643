"""Published settings, by name.

Source: Mack & Turner 2024, "Mechanistically eliciting latent behaviors in language models", and the
code that came with it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from tl_melbo.shapes import shape_checked


@dataclass(frozen=True)
class Preset:
    """What somebody searched with, and for what.

        preset = tm.PRESETS["refusal"]
        layers = preset.layers(model.cfg.n_layers)
        f = tm.ActivationMap.from_prompts(model, prompt, chat=True, **layers)
        found = tm.melbo(f, **preset.fast)

    Attributes:
        about: what was looked for, in which model, and what came out.
        model: the model's name.
        search: arguments of `melbo`, the published optimiser's steps included.
        source_layer: s; the vectors are added to the residual stream after block s.
        target_from_end: so many blocks before the end their effect is measured: after block
            n_layers - target_from_end.
        source: where the settings come from.
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
        left = {name: self.search[name] for name in self.search if name != "steps"}
        return {**left, "optimiser": "ascent"}

    @shape_checked
    def layers(self, n_layers: int) -> dict[str, int]:
        """The layers for a model of so many blocks, as arguments of `from_prompts`.

        Raises:
            ValueError: the model is so shallow that the target would not come after the source.
        """
        target = n_layers - self.target_from_end
        if target <= self.source_layer:
            least = self.source_layer + self.target_from_end + 1
            raise ValueError(
                f"n_layers={n_layers}: this preset adds after layer {self.source_layer} and "
                f"measures {self.target_from_end} before the end, which takes {least} layers or "
                "more; choose source_layer and target_layer by hand, at about a quarter and half "
                "of the depth"
            )
        return {"source_layer": self.source_layer, "target_layer": target}


def _search(**settings: Any) -> Mapping[str, Any]:
    return MappingProxyType({"orthogonal": True, **settings})


def _original(about: str, model: str, search: Mapping[str, Any]) -> Preset:
    """One of the original code, which has the same layers for all."""
    return Preset(
        about, model, search, source_layer=7, target_from_end=9,
        source="Mack & Turner 2024, original code",
    )  # fmt: skip


_EVERYWHERE, _LAST_THREE = slice(None), slice(-3, None)

_BUNDLED = Preset(
    about="The demo's: personas, leaked prompts, stories in SmolLM2-135M-Instruct.",
    model="SmolLM2-135M-Instruct",
    search=_search(
        n_vectors=32, radius=12.0, p=2, q=2, positions=_LAST_THREE, optimiser="ascent", steps=10,
    ),
    source_layer=8,
    target_from_end=14,
    source="ours",
)  # fmt: skip

PRESETS: Mapping[str, Preset] = MappingProxyType(
    {
        "chain-of-thought": _original(
            about="Step-by-step reasoning in a base model: one of the vectors lifted two-step "
            "arithmetic from 11% to 63%.",
            model="Qwen-1.8B (base)",
            search=_search(
                n_vectors=32, radius=1.0, p=4, q=4, positions=_EVERYWHERE, optimiser="adamw",
                steps=300,
            ),
        ),
        "refusal": _original(
            about="Answers to what a chat model refuses; the negative of such a vector makes it "
            "refuse harmless requests.",
            model="Qwen-14B-Chat",
            search=_search(
                n_vectors=32, radius=4.0, p=2, q=1, positions=_EVERYWHERE, optimiser="adamw",
                steps=600,
            ),
        ),
        "backdoor": _original(
            about="Behaviour planted behind a trigger, brought out by prompts without it: 2 to 3 "
            "of 100 vectors did.",
            model="Qwen-1.8B, fine-tuned",
            search=_search(
                n_vectors=100, radius=4.0, p=2, q=1, positions=_LAST_THREE, optimiser="adamw",
                steps=1200,
            ),
        ),
        "bundled": _BUNDLED,
        "embedded": _BUNDLED,  # the name of version 0.1
    }
)  # fmt: skip
