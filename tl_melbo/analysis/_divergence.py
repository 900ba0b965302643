"""Do they do the same thing? Divergence between next-token distributions."""

from typing import Literal

import torch
from torch import Tensor

from tl_melbo import checks
from tl_melbo.geometry import random_sphere
from tl_melbo.model.bridge import Model
from tl_melbo.probability import LogProbs, kl_from_log_probs
from tl_melbo.reading import map_next_token, next_token_log_probs, warn_of_log_probs
from tl_melbo.shapes import Float, Theta, shape_checked
from tl_melbo.steering import Reference, Vectors, as_chat, as_theta, steering_layer
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
        model: a TransformerLens model.
        prompt: one text.
        vectors: which vectors to add, each by itself.
        reference: exactly one vector to compare with; None for the unsteered model.
        direction: "to_reference" is KL(P_vector || P_reference), which the published plots show;
            "from_reference" is KL(P_reference || P_vector).
        layer: after which block to add them; None takes the layer that they were found at.
        chat: format the prompt as chat; None does as was done when `vectors` were found, or else
            does not.
        batch_size: rows of the batch.

    Returns:
        In nats, one number a vector, float32, on the CPU.

    Raises:
        ValueError: more or fewer than one reference; also as `next_token_log_probs` does.
        NotFinite: the logits are not finite under the reference, or any vector.

    Warns:
        UserWarning: they are not finite under some vectors, whose divergence is NaN.

    Source: Jacob G-W 2024, "I found >800 orthogonal 'write code' steering vectors", whose plot
    shows KL(P_i || P_0) though its title says the reverse.
    """
    checks.batch_size(batch_size)
    chat = as_chat(vectors, chat)
    if reference is not None:
        checks.exactly_one(
            reference, "reference", "pick one, as found[5], or None for the unsteered model"
        )
    own_layer = steering_layer(model, vectors, layer)
    if layer is None and isinstance(reference, SteeringVectors):
        layer = reference.source_layer
    # A tensor does not know where it belongs: where the others do.
    log_reference = next_token_log_probs(
        model, prompt, reference, own_layer if layer is None else layer, chat=chat
    )

    def measure(log_vectors: LogProbs) -> Tensor:
        log_references = log_reference.expand_as(log_vectors)
        if direction == "to_reference":
            return kl_from_log_probs(log_vectors, log_references)
        return kl_from_log_probs(log_references, log_vectors)

    theta, layer = as_theta(model, vectors), own_layer
    kl = map_next_token(model, prompt, theta, layer, measure, chat=chat, batch_size=batch_size)
    warn_of_log_probs(model, prompt, layer, kl.isnan())
    return kl


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
    """What `kl_divergence` is to be held against: no vector, and random ones of the same norms.

        kl = tm.analysis.kl_divergence(model, prompt, ortho, found[5])
        baselines = tm.analysis.kl_baselines(model, prompt, ortho, found[5])
        tm.plots.kl_curve(kl, ortho, baselines=baselines)

    Args:
        model: a TransformerLens model.
        prompt: one text.
        vectors: the vectors that were measured.
        reference: exactly one vector, the one that they were compared with.
        direction: as for `kl_divergence`.
        layer: after which block to add them; None takes the layer that they were found at.
        chat: format the prompt as chat; None does as was done when `vectors` were found, or else
            does not.
        seed: for the random vectors.

    Returns:
        "unsteered", one number, and "random vectors of the same norms", one for each vector; in
        nats.

    Raises:
        ValueError: as `kl_divergence`.
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
    """Vectors in random directions, each as long as the one it stands for."""
    generator = torch.Generator().manual_seed(seed)
    units = random_sphere(len(theta), theta.shape[1], generator=generator)
    return units * theta.cpu().norm(dim=-1, keepdim=True)
