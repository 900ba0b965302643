"""Where along a completion do the steered and the unsteered model part?"""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from tl_melbo import checks
from tl_melbo.additions import Additions, VectorAdditions
from tl_melbo.analysis._coherence import tokens_of
from tl_melbo.analysis._tokens import shown_tokens
from tl_melbo.errors import warn_of_rows
from tl_melbo.generation import OnBatch, in_parts
from tl_melbo.memory import map_batches
from tl_melbo.model.bridge import Model, check_model, model_device, model_name, plain_model
from tl_melbo.model.tokens import context_length, to_tokens
from tl_melbo.probability import kl_from_log_probs
from tl_melbo.reading import adding, rows_at_once
from tl_melbo.shapes import shape_checked
from tl_melbo.steering import Steerable, as_chat, steering_rows
from tl_melbo.tables import Table

_NEEDED = ("vector", "scale", "prompt", "completion")
_COLUMNS = ["kl", "log_prob", "unsteered_log_prob", "top", "unsteered_top"]


@shape_checked
def token_divergence(
    model: Model,
    completions: pd.DataFrame,
    vectors: Steerable,
    n_top: int = 5,
    *,
    layer: int | None = None,
    chat: bool | None = None,
    batch_size: int = 32,
    on_batch: OnBatch | None = None,
) -> pd.DataFrame:
    """Compare the steered and the unsteered model at every token of completions.

    Args:
        completions: of `vectors`, as `generate` gives them. Rows of the unsteered model and empty
            completions are left out. The text is read anew: where it ended is no place of it, and
            a character that was cut at its end is other tokens than were written.
        n_top: how many of the likeliest tokens to tell.
        chat: None takes what `generate` noted in the frame, or else as the vectors were found.
        on_batch: called with the completions read, and those in all, after each batch.

    Returns:
        A row for each token: vector, scale, sample (if there), prompt; position in the completion,
        from 0; token, printable; token_id; kl, KL(P_steered || P_unsteered) of the distribution at
        its place, in nats; log_prob and unsteered_log_prob of the token; top and unsteered_top, the
        likeliest tokens there, pairs of a printable token and its probability. Completions whose
        logits are not finite are left out, with a warning.

    Raises:
        ValueError: no completion of a vector; vectors that are not there; a text that is too long.
        NotFinite: the logits of all completions are not finite.
    """
    check_model(model)
    checks.columns(completions, _NEEDED, "completions", "pass the frame that generate returned")
    checks.between(1, int(model.cfg.d_vocab), "a number of tokens", n_top=n_top)
    checks.at_least(1, batch_size=batch_size)
    noted = completions.attrs.get("chat")
    chat = as_chat(vectors, noted if chat is None else chat)
    # An empty text may have been read back from a file as a missing number.
    is_text = completions["completion"].map(lambda text: isinstance(text, str))
    of_vectors: Any = completions[is_text & (completions["vector"] >= 0)]
    rows = [r for r in of_vectors.to_dict("records") if tokens_of(model, r["completion"])]
    if not rows:
        raise ValueError("completions: no text of a vector; pass what generate wrote under vectors")
    prompts = {
        text: to_tokens(model, text, chat)[0].tolist() for text in {r["prompt"] for r in rows}
    }
    pairs = [(prompts[row["prompt"]], tokens_of(model, row["completion"])) for row in rows]
    lengths, limit = [len(before) + len(text) for before, text in pairs], context_length(model)
    if limit and max(lengths) > limit:
        what = f"one has {max(lengths)} tokens with its prompt"
        raise ValueError(f"completions: {what}; the model reads {limit}")
    steered = _rows_of(model, rows, vectors, layer)
    # The longest first: neighbours are of nearly one length, so little is padded.
    order = sorted(range(len(rows)), key=lambda i: -lengths[i])

    def read(numbers: list[int]) -> list[dict[str, Tensor]]:
        some = [pairs[number] for number in numbers]
        return _read(model, some, steered[torch.tensor(numbers)], n_top)

    at_once = rows_at_once(model, max(lengths), batch_size)
    (tell,) = in_parts(on_batch, [len(rows)])
    parts, _ = map_batches(read, order, at_once, tell)
    measured = dict(zip(order, [each for part in parts for each in part], strict=True))
    bad = [bool(measured[i]["kl"].isnan().any()) for i in range(len(rows))]
    warn_of_rows(bad, f"what {model_name(model)} makes of completions", "they are left out")
    kept = [(row, pairs[i][1], measured[i]) for i, row in enumerate(rows) if not bad[i]]
    return Table(pd.concat([_frame(model, *each) for each in kept], ignore_index=True))


def _rows_of(
    model: Model, rows: Sequence[Mapping[str, Any]], vectors: Steerable, layer: int | None
) -> Additions:
    """What steers each completion."""
    scales = list(dict.fromkeys(float(row["scale"]) for row in rows))
    steered = steering_rows(model, vectors, layer, scales)
    n_vectors = len(steered) // len(scales)
    if missing := {int(row["vector"]) for row in rows} - {*range(n_vectors)}:
        given = f"of vectors {sorted(missing)[:10]}, but vectors holds {n_vectors}"
        raise ValueError(f"completions: {given}; pass those that wrote them")
    places = [scales.index(float(row["scale"])) * n_vectors + int(row["vector"]) for row in rows]
    return steered[torch.tensor(places)]


def _read(
    model: Model, some: Sequence[tuple[list[int], list[int]]], rows: Additions, n_top: int
) -> list[dict[str, Tensor]]:
    """What is measured at every token of completions after their prompts, steered by these rows."""
    whole = [torch.tensor([*before, *text]) for before, text in some]
    # No token looks ahead: what stands after a text's end changes nothing in it.
    tokens = torch.nn.utils.rnn.pad_sequence(whole, True).to(model_device(model))
    first = min(len(before) for before, _ in some) - 1
    plain = plain_model(model)

    def logits(rows: Additions) -> Tensor:
        with adding(model, plain, rows) as runs:
            if plain is None:
                return runs(tokens)[:, first:]
            return runs(tokens, use_cache=False, logits_to_keep=tokens.shape[1] - first).logits

    nothing = VectorAdditions.of(torch.zeros(1, int(model.cfg.d_model)), 0)
    # Both passes are of one shape, so that no vector has no effect to the last bit.
    steered, unsteered = logits(rows), logits(nothing)
    found = []
    for row, (before, text) in enumerate(some):
        own = slice(len(before) - 1 - first, len(before) - 1 - first + len(text))
        found.append(_compared(steered[row, own], unsteered[row, own], torch.tensor(text), n_top))
    return found


def _compared(steered: Tensor, unsteered: Tensor, text: Tensor, n_top: int) -> dict[str, Tensor]:
    """Of one completion's logits, [pos, d_vocab]: all on the CPU."""
    p, q = (logits.float().log_softmax(-1).cpu() for logits in (steered, unsteered))
    found = {"kl": kl_from_log_probs(p, q)}
    for name, log_probs in (("", p), ("unsteered_", q)):
        found[f"{name}log_prob"] = log_probs.gather(-1, text[:, None])[:, 0]
        top = log_probs.topk(n_top)
        found[f"{name}top"] = torch.stack([top.indices.double(), top.values.double().exp()], -1)
    return found


def _frame(
    model: Model, row: Mapping[str, Any], text: list[int], measured: Mapping[str, Tensor]
) -> pd.DataFrame:
    """The rows of one completion."""
    likeliest = {name: measured[name].tolist() for name in ("top", "unsteered_top")}
    numbers = [int(number) for some in likeliest.values() for at in some for number, _ in at]
    shown = shown_tokens(model, [*text, *numbers])
    told = {name: row[name] for name in ("vector", "scale", "sample", "prompt") if name in row}
    columns: dict[str, Any] = {
        "position": range(len(text)),
        "token": [shown[number] for number in text],
        "token_id": text,
        **{name: measured[name].numpy() for name in _COLUMNS[:3]},
    }
    for name, some in likeliest.items():
        columns[name] = [tuple((shown[int(number)], p) for number, p in at) for at in some]
    return pd.DataFrame({**dict.fromkeys(told), **columns}).assign(**told)
