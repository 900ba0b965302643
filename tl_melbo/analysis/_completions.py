"""What does the model write without a vector, under each, and under its negative?"""

from collections.abc import Callable, Sequence

import pandas as pd

from tl_melbo.generation import generate
from tl_melbo.model.bridge import Model
from tl_melbo.shapes import shape_checked
from tl_melbo.steering import as_chat
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
        model: a TransformerLens model.
        prompts: one text or several.
        found: the vectors.
        max_new_tokens: the most tokens to write; the likeliest one is taken each time.
        layer: after which block to add the vectors; None takes the layer they were found at.
        chat: format the prompts as chat; None does as was done when the vectors were found.
        batch_size: rows of a batch.
        on_batch: called with the vectors done, and the vectors in all, after each batch.

    Returns:
        A frame with the columns vector (position in `found`, or -1 for unsteered), scale (1, -1,
        or 0 for unsteered), prompt, completion; for each prompt the unsteered row comes first.

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
    frame = pd.concat(frames, ignore_index=True)
    rows = frame.to_dict("records")
    rows.sort(key=lambda row: (texts.index(row["prompt"]), row["vector"], -row["scale"]))
    found_texts = Table(rows, columns=COMPLETION_COLUMNS)
    found_texts.attrs["chat"] = chat
    return found_texts
