"""What does the model write: under each vector, at other norms, after other prompts?"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from tl_melbo import checks, steering
from tl_melbo.additions import VectorAdditions
from tl_melbo.analysis._coherence import repetition, tokens_of
from tl_melbo.analysis._similarity import kl_divergence, kl_to
from tl_melbo.engines import Engine
from tl_melbo.generation import OnBatch, generate, in_parts
from tl_melbo.model.bridge import Model
from tl_melbo.probability import LogProbs
from tl_melbo.reading import map_next_token, next_token_log_probs
from tl_melbo.shapes import shape_checked
from tl_melbo.steering import Reference, Vectors
from tl_melbo.tables import Table
from tl_melbo.vectors import SteeringVectors

COMPLETION_COLUMNS = ["vector", "scale", "prompt", "completion"]
DEFAULT_SCALES = (-2.0, -1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0)


@shape_checked
def collect_completions(
    model: Model,
    prompts: str | Sequence[str],
    found: SteeringVectors,
    *,
    max_new_tokens: int = 50,
    scales: Sequence[float] = (1.0, -1.0),
    n_samples: int | None = None,
    temperature: float | None = None,
    layer: int | None = None,
    chat: bool | None = None,
    batch_size: int = 128,
    engine: Engine | None = None,
    on_batch: OnBatch | None = None,
) -> pd.DataFrame:
    """Let the model write without a vector, under each vector, and under its negative.

    Args:
        scales: others than 1 and -1 get a greedy completion more each.
        n_samples: so many sampled completions more, unsteered and at the scales 1 and -1.
        temperature: of the samples; None takes 0.7.

    Returns:
        A row a completion: vector (-1 for unsteered), scale (0 for unsteered), prompt, completion;
        with `n_samples` also sample (0 for greedy). For each prompt the unsteered ones come first,
        then vector by vector, from the largest scale to the smallest. Errors are those of
        `generate`.
    """
    if temperature is not None and n_samples is None:
        raise ValueError(f"temperature={temperature}: of samples; pass n_samples, too")
    texts = [prompts] if isinstance(prompts, str) else list(dict.fromkeys(prompts))
    chat = steering.as_chat(found, chat)
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "chat": chat}
    options |= {"batch_size": batch_size, "engine": engine}
    drawn = {"n_samples": n_samples, "temperature": temperature}
    others = sorted({float(scale) for scale in scales} - {-1.0, 0.0, 1.0})
    parts: list[dict[str, Any]] = [drawn, {"vectors": found, "scales": [1.0, -1.0], **drawn}]
    parts += [{"vectors": found, "scales": others}] if others else []
    rows = len(texts) * (1 + (n_samples or 0))
    sizes = [rows, 2 * len(found) * rows, len(found) * len(texts) * len(others)]
    frame = pd.concat(
        generate(model, texts, layer=layer, on_batch=tell, **part, **options)
        for part, tell in zip(parts, in_parts(on_batch, sizes), strict=False)
    )
    if n_samples:
        frame["sample"] = frame["sample"].fillna(0).astype(int)
    frame["of_prompt"] = [texts.index(prompt) for prompt in frame["prompt"]]
    order = ["of_prompt", "vector", "scale"]
    frame = frame.sort_values(order, ascending=[True, True, False], kind="stable")
    frame = Table(frame.drop(columns="of_prompt").reset_index(drop=True))
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
    engine: Engine | None = None,
) -> pd.DataFrame:
    """Steer prompts that the vectors were not found on; errors are those of `generate`.

    Returns:
        A row for each prompt and vector: prompt; vector, its position; kl, KL(P_vector ||
        P_unsteered) of the next token, in nats; completion; unsteered_completion.

    Source: Jacob G-W 2024, "I found >800 orthogonal 'write code' steering vectors".
    """
    library, texts = steering.as_library(vectors), checks.as_texts(prompts)
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "chat": chat, "engine": engine}
    frame = generate(model, texts, library, layer, **options)
    # Scaled by zero, a vector is the unsteered model, and brings its layer and chat format along.
    unsteered = generate(model, texts, library[0], layer, scales=0.0, **options)["completion"]
    kl = torch.cat([kl_divergence(model, text, library, layer=layer, chat=chat) for text in texts])
    frame.insert(0, "prompt", frame.pop("prompt"))
    frame.insert(2, "kl", kl.numpy())
    frame["unsteered_completion"] = unsteered.repeat(len(library)).to_numpy()
    return frame.drop(columns="scale")


@shape_checked
def rescale(vectors: Vectors, norm: float | Reference) -> SteeringVectors:
    """Each vector at another norm, in its own direction: `rescale(ortho, 12.0)`.

    The column "scale" tells the factors; what was measured at the old norm is left out.

    Args:
        norm: in units of the residual stream; or exactly one vector, to take its norm.

    Raises:
        ValueError: a vector without a direction; a norm that is not positive and finite.

    Source: Jacob G-W 2024, "I found >800 orthogonal 'write code' steering vectors".
    """
    library = steering.as_library(vectors)
    is_number = isinstance(norm, int | float)
    length = float(norm if is_number else steering.one_vector(norm, "norm").norms[0])
    checks.positive(norm=length)
    factors = length / checks.directions(library.vectors.double(), "vectors").norm(dim=-1)
    scales = library.columns.get("scale", torch.ones(len(library), dtype=torch.float32)) * factors
    return replace(
        library,
        vectors=library.vectors.double() * factors[:, None],
        columns={"index": library.columns["index"], "scale": scales.float()},
        history=None,
    )


@shape_checked
def scale_sweep(
    model: Model,
    prompt: str,
    vectors: Vectors,
    scales: Sequence[float] = DEFAULT_SCALES,
    *,
    max_new_tokens: int = 50,
    layer: int | None = None,
    chat: bool | None = None,
) -> pd.DataFrame:
    """Scale and negate vectors: where is the output changed but coherent? Errors as of `generate`.

    Returns:
        A row for each vector and scale: vector, scale, norm in units of the residual stream; kl,
        KL(P_vector || P_unsteered), and entropy of the next token, in nats; repetition; completion.
    """
    library = steering.as_library(vectors)
    theta = steering.as_theta(model, library)
    options = {"max_new_tokens": max_new_tokens, "chat": chat}
    frame = generate(model, prompt, library, layer, scales=scales, **options)
    del frame["prompt"]
    # Scaled by zero, a vector is the unsteered model, and brings its layer and chat format along.
    unsteered = next_token_log_probs(model, prompt, library[0], layer, scale=0.0, chat=chat)
    layer, chat = steering.steering_layer(model, library, layer), steering.as_chat(library, chat)
    # The same order as that of the completions: scale by scale.
    rows = torch.cat([theta * scale for scale in scales])

    def measure(log_probs: LogProbs) -> Tensor:
        entropy = torch.special.entr(log_probs.double().exp()).sum(-1, keepdim=True)
        return torch.cat([kl_to(unsteered)(log_probs), entropy.float()], 1)

    added = VectorAdditions.of(rows, layer)
    kl, entropy = map_next_token(model, prompt, added, measure, chat=chat).unbind(1)
    frame.insert(2, "norm", rows.norm(dim=-1).cpu().numpy())
    frame.insert(3, "kl", kl.numpy())
    frame.insert(4, "entropy", entropy.numpy())
    repeated = [repetition(tokens_of(model, text)) for text in frame["completion"]]
    frame.insert(5, "repetition", repeated)
    return frame.sort_values("vector", kind="stable", ignore_index=True)
