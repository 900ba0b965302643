"""Do they do it elsewhere? The same vectors on other prompts."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from tl_melbo.analysis._divergence import kl_divergence
from tl_melbo.checks import as_texts
from tl_melbo.generation import generate
from tl_melbo.model.bridge import Model
from tl_melbo.shapes import shape_checked
from tl_melbo.steering import Vectors, as_library

if TYPE_CHECKING:
    import pandas as pd


@shape_checked
def transfer(
    model: Model,
    vectors: Vectors,
    prompts: str | Sequence[str],
    *,
    max_new_tokens: int = 50,
    layer: int | None = None,
    chat: bool | None = None,
) -> "pd.DataFrame":
    """Steer prompts that the vectors were not found on, beside what the model writes by itself.

    Args:
        model: a TransformerLens model.
        vectors: which vectors to add, each by itself.
        prompts: one text or several.
        max_new_tokens: the most tokens to write.
        layer: after which block to add them; None takes the layer that they were found at.
        chat: format the prompts as chat; None does as was done when the vectors were found, or
            else does not.

    Returns:
        One row a prompt and vector. prompt; vector, its position in `vectors`; kl,
        KL(P_vector || P_unsteered) of the next token, in nats; completion; unsteered_completion.

    Raises:
        ValueError: no vectors, no prompts or an empty one; as `generate` does.

    Source: Jacob G-W 2024, "I found >800 orthogonal 'write code' steering vectors".
    """
    library, texts = as_library(vectors), as_texts(prompts, "prompts")
    frame = generate(model, texts, library, layer, max_new_tokens=max_new_tokens, chat=chat)
    # Scaled by zero, a vector is the unsteered model, and brings its layer and chat format along.
    unsteered = generate(
        model, texts, library[0], layer, scales=0.0, max_new_tokens=max_new_tokens, chat=chat
    )["completion"]
    kl = torch.cat([kl_divergence(model, text, library, layer=layer, chat=chat) for text in texts])
    frame.insert(0, "prompt", frame.pop("prompt"))
    frame.insert(2, "kl", kl.numpy())
    frame["unsteered_completion"] = unsteered.repeat(len(library)).to_numpy()
    return frame.drop(columns="scale")
