"""What does the model write under each vector, under its negative, and after other prompts?"""

from collections.abc import Callable, Sequence

import pandas as pd
import torch

from tl_melbo.analysis._similarity import kl_divergence
from tl_melbo.checks import as_texts
from tl_melbo.generation import generate
from tl_melbo.model.bridge import Model
from tl_melbo.shapes import shape_checked
from tl_melbo.steering import Vectors, as_chat, as_library
from tl_melbo.tables import Table
from tl_melbo.vectors import SteeringVectors

COMPLETION_COLUMNS = ["vector", "scale", "prompt", "completion"]

OnBatch = Callable[[int, int], None]


@shape_checked
def collect_completions(
    model: Model,
    prompts: str | Sequence[str],
    found: SteeringVectors,
    *,
    max_new_tokens: int = 50,
    layer: int | None = None,
    chat: bool | None = None,
    batch_size: int = 32,
    on_batch: OnBatch | None = None,
) -> pd.DataFrame:
    """Let the model write without a vector, under each vector, and under its negative.

    Args:
        on_batch: called with the vectors done, and the vectors in all, after each batch.

    Returns:
        The columns vector (position in `found`, or -1 for unsteered), scale (1, -1, or 0 for
        unsteered), prompt, completion; for each prompt the unsteered row comes first.

    Raises:
        TypeError, ValueError: as `generate` does.
    """
    texts = [prompts] if isinstance(prompts, str) else list(dict.fromkeys(prompts))
    chat = as_chat(found, chat)
    options = {"max_new_tokens": max_new_tokens, "chat": chat, "batch_size": batch_size}
    frames = [generate(model, texts, **options)]
    at_once = max(1, batch_size // 2)
    for first in range(0, len(found), at_once):
        some = found[first : first + at_once]
        frame = generate(model, texts, some, layer, scales=[1.0, -1.0], **options)
        frames.append(frame.assign(vector=frame["vector"] + first))
        if on_batch is not None:
            on_batch(first + len(some), len(found))
    rows = pd.concat(frames, ignore_index=True).to_dict("records")
    rows.sort(key=lambda row: (texts.index(row["prompt"]), row["vector"], -row["scale"]))
    frame = Table(rows, columns=COMPLETION_COLUMNS)
    frame.attrs["chat"] = chat
    return frame


@shape_checked
def transfer(
    model: Model,
    vectors: Vectors,
    prompts: str | Sequence[str],
    *,
    max_new_tokens: int = 50,
    layer: int | None = None,
    chat: bool | None = None,
) -> pd.DataFrame:
    """Steer prompts that the vectors were not found on, beside the unsteered completions.

    Returns:
        One row a prompt and vector. prompt; vector, its position in `vectors`; kl, KL(P_vector ||
        P_unsteered) of the next token, in nats; completion; unsteered_completion.

    Raises:
        ValueError: no vectors, no prompts or an empty one; as `generate` does.

    Source: Jacob G-W 2024, "I found >800 orthogonal 'write code' steering vectors".
    """
    library, texts = as_library(vectors), as_texts(prompts)
    options = {"max_new_tokens": max_new_tokens, "chat": chat}
    frame = generate(model, texts, library, layer, **options)
    # Scaled by zero, a vector is the unsteered model, and brings its layer and chat format along.
    unsteered = generate(model, texts, library[0], layer, scales=0.0, **options)["completion"]
    kl = torch.cat([kl_divergence(model, text, library, layer=layer, chat=chat) for text in texts])
    frame.insert(0, "prompt", frame.pop("prompt"))
    frame.insert(2, "kl", kl.numpy())
    frame["unsteered_completion"] = unsteered.repeat(len(library)).to_numpy()
    return frame.drop(columns="scale")
