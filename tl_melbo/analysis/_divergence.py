"""Do they do the same thing? Divergence between next-token distributions."""

from collections.abc import Callable
from typing import Literal

import pandas as pd
import torch
from torch import Tensor

from tl_melbo import checks
from tl_melbo.activation_map import ActivationMap
from tl_melbo.analysis._similarity import effect_distance
from tl_melbo.generation import generate
from tl_melbo.geometry import random_sphere
from tl_melbo.model.bridge import Model
from tl_melbo.probability import LogProbs, kl_from_log_probs
from tl_melbo.reading import map_next_token, next_token_log_probs, warn_of_log_probs
from tl_melbo.shapes import Float, Theta, shape_checked
from tl_melbo.steering import Reference, Vectors, as_chat, as_theta, check_place, steering_layer
from tl_melbo.vectors import SteeringVectors

Direction = Literal["to_reference", "from_reference"]


@shape_checked
def kl_divergence(
    model: Model,
    prompt: str,
    vectors: Vectors,
    reference: Reference | None = None,
    direction: Direction = "to_reference",
    layer: int | None = None,
    chat: bool | None = None,
    *,
    batch_size: int = 32,
) -> Float[Tensor, "vector"]:
    """How far each vector moves the distribution of the token after the prompt.

    Args:
        reference: exactly one vector to compare with; None for the unsteered model.
        direction: "to_reference" is KL(P_vector || P_reference), which the published plots show;
            "from_reference" is KL(P_reference || P_vector).

    Returns:
        In nats, float32, on the CPU; NaN, with a warning, where the logits are not finite.

    Raises:
        ValueError: not exactly one reference; also as `next_token_log_probs` does.
        NotFinite: the logits are not finite under the reference, or any vector.

    Source: Jacob G-W 2024, "I found >800 orthogonal 'write code' steering vectors", whose plot
    shows KL(P_i || P_0) though its title says the reverse.
    """
    checks.batch_size(batch_size)
    chat, own_layer = as_chat(vectors, chat), steering_layer(model, vectors, layer)
    if reference is not None:
        advice = "pick one, as found[5], or None for the unsteered model"
        checks.exactly_one(reference, "reference", advice)
    if layer is None and isinstance(reference, SteeringVectors):
        layer = reference.source_layer
    # A tensor does not know where it belongs: where the others do.
    log_reference = next_token_log_probs(
        model, prompt, reference, own_layer if layer is None else layer, chat=chat
    )
    theta, measure = as_theta(model, vectors), kl_to(log_reference, direction)
    kl = map_next_token(
        model, prompt, theta, own_layer, measure, chat=chat, batch_size=batch_size
    ).squeeze(1)
    warn_of_log_probs(model, prompt, own_layer, kl.isnan())
    return kl


def kl_to(
    log_references: LogProbs, direction: Direction = "to_reference"
) -> Callable[[LogProbs], Tensor]:
    """For `map_next_token`: the divergence of each row from each reference, [row, reference]."""

    def measure(log_probs: LogProbs) -> Tensor:
        pairs = [(log_probs, reference.expand_as(log_probs)) for reference in log_references]
        if direction == "from_reference":
            pairs = [(q, p) for p, q in pairs]
        return torch.stack([kl_from_log_probs(p, q) for p, q in pairs], 1)

    return measure


@shape_checked
def kl_baselines(
    model: Model,
    prompt: str,
    vectors: Vectors,
    reference: Reference,
    direction: Direction = "to_reference",
    layer: int | None = None,
    chat: bool | None = None,
    *,
    seed: int = 0,
) -> dict[str, Float[Tensor, "vector"]]:
    """What to compare `kl_divergence` with: no vector, and random ones of the same norms.

        kl = tm.analysis.kl_divergence(model, prompt, ortho, found[5])
        baselines = tm.analysis.kl_baselines(model, prompt, ortho, found[5])
        tm.plots.kl_curve(kl, ortho, baselines=baselines)

    Returns:
        "unsteered", one number, and "random vectors of the same norms", one for each vector; in
        nats.

    Raises:
        ValueError: as `kl_divergence`, whose arguments these are.
    """
    chat, layer = as_chat(vectors, chat), steering_layer(model, vectors, layer)
    theta = as_theta(model, vectors)
    compared = {
        "unsteered": torch.zeros_like(theta[:1]),
        "random vectors of the same norms": random_like(theta, seed),
    }
    return {
        name: kl_divergence(model, prompt, rows, reference, direction, layer, chat)
        for name, rows in compared.items()
    }


def random_like(theta: Theta, seed: int) -> Theta:
    """Vectors in random directions, each of the norm of the one it stands for."""
    generator = torch.Generator().manual_seed(seed)
    units = random_sphere(len(theta), theta.shape[1], generator=generator)
    return units * theta.cpu().norm(dim=-1, keepdim=True)


def comparison(
    model: Model,
    f: ActivationMap,
    vectors: SteeringVectors,
    reference: SteeringVectors | None,
    prompt: str | None,
    chat: bool | None,
    max_new_tokens: int,
) -> Callable[[Theta, bool], pd.DataFrame]:
    """Check where vectors belong; then give what compares any rows with the reference.

    It measures norm, distance, kl_to_reference, kl_from_reference and kl_to_unsteered, as in
    `family`, and completion, if the rows are to write. Without a reference its numbers are NaN.

    Raises:
        ValueError: the vectors or the reference are of another model, width or layer than `f`.
    """
    check_place(model, f, vectors, "vectors")
    unsteered = torch.zeros_like(as_theta(model, vectors)[:1])
    others = unsteered
    if reference is not None:
        check_place(model, f, reference, "reference")
        others = torch.cat([as_theta(model, reference), unsteered])
    text = f.prompts[0] if prompt is None else prompt
    layer, chat = f.source_layer, f.chat if chat is None else chat
    log_others = next_token_log_probs(model, text, others, layer, chat=chat)
    to, back = kl_to(log_others), kl_to(log_others[:1], "from_reference")

    def measure(log_probs: LogProbs) -> Tensor:
        return torch.cat([back(log_probs), to(log_probs)], 1)

    def compare(rows: Theta, writes: bool) -> pd.DataFrame:
        kl = map_next_token(model, text, rows, layer, measure, chat=chat)
        unknown = torch.full_like(kl[:, 0], torch.nan)
        distance = unknown if reference is None else effect_distance(f, rows, reference)
        frame = pd.DataFrame(
            {
                "norm": rows.norm(dim=-1).cpu().numpy(),
                "distance": distance.numpy(),
                "kl_to_reference": (unknown if reference is None else kl[:, 1]).numpy(),
                "kl_from_reference": (unknown if reference is None else kl[:, 0]).numpy(),
                "kl_to_unsteered": kl[:, -1].numpy(),
                "completion": None,
            }
        )
        if writes:
            warn_of_log_probs(model, text, layer, kl[:, -1].isnan())
            frame["completion"] = generate(
                model, text, rows, layer, max_new_tokens=max_new_tokens, chat=chat
            )["completion"]
        return frame

    return compare
