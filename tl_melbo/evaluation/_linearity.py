"""Is what an adapter does one direction? Its texts and its vectors' texts, described by a judge."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from tl_melbo import checks
from tl_melbo.additions import Steering
from tl_melbo.analysis._coherence import tokens_of
from tl_melbo.analysis._embedding import Embedder, default_embedder, embeddings
from tl_melbo.errors import NoAnswer
from tl_melbo.generation import generate
from tl_melbo.judges._asking import Judge, ask, check_judge
from tl_melbo.model.bridge import Model
from tl_melbo.shapes import Float, shape_checked
from tl_melbo.steering import Reference, Steerable, steering_rows
from tl_melbo.tables import Table

_CONFIDENCE = 0.95
_QUESTION = """Below are {n} pairs of texts. The first text of each pair is ordinary. The second \
was written under an influence that is the same in all pairs.

{pairs}

In one sentence, how do the second texts differ from the first ones? Name what they have in \
common, not what single texts are about."""
_PAIR = """Pair {number}, first text:
{unsteered}
Pair {number}, second text:
{steered}"""


@dataclass(frozen=True, eq=False)
class Score:
    """How alike two sets of descriptions are; see `linearity_score`.

    Attributes:
        matrix: cosines of the embeddings, [description of a, description of b].
        matched: for each description of a, the number of its partner.
        score: the mean cosine of the partners.
        low, high: 95% interval of the mean of as many partners, by Student's t.
    """

    matrix: Float[Tensor, "a b"]
    matched: list[int]
    score: float
    low: float
    high: float


@dataclass(frozen=True, eq=False)
class Linearity(Score):
    """What `linearity` gives: a score, with what was described.

    Attributes:
        of_adapter, of_vectors: the judge's descriptions.
        texts: prompt, adapter, vectors and unsteered: the texts that the judge saw.
        left_out: how many prompts were left out, because one side wrote nothing.
    """

    of_adapter: list[str]
    of_vectors: list[str]
    texts: pd.DataFrame
    left_out: int


@shape_checked
def linearity(
    model: Model,
    adapter: Steerable,
    vectors: Reference | Steering,
    prompts: Sequence[str],
    *,
    judge: Judge,
    layer: int | None = None,
    **settings: Any,
) -> Linearity:
    """Compare what a model writes under an adapter with what it writes under the adapter's vectors.

    A score alone says little: `linearity_null` holds several adapters' scores against the scores
    between them. Arguments and errors are those of `linearities`; a ValueError for several rows.
    """
    for name, (steering, own) in _sides(adapter, vectors, layer).items():
        if len(steering_rows(model, steering, own, [1.0])) > 1:
            raise ValueError(f"{name}: more than one; pass one, as found[5], or all to linearities")
    return linearities(model, adapter, vectors, prompts, judge=judge, layer=layer, **settings)[0]


@shape_checked
def linearities(
    model: Model,
    adapters: Steerable,
    vectors: Reference | Steering,
    prompts: Sequence[str],
    *,
    judge: Judge,
    n_batches: int = 6,
    layer: int | None = None,
    max_new_tokens: int = 50,
    chat: bool | None = None,
    embedder: Embedder | None = None,
    seed: int = 0,
    batch_size: int = 32,
) -> list[Linearity]:
    """`linearity` of each of several adapters, as `linearity_null` needs them.

        adapters = tm.divergence_adapter(model, n_adapters=8)
        scores = tm.evaluation.linearities(model, adapters, adapters.vectors(model), ...)

    A judge sees random batches of texts beside the unsteered ones, and says in a sentence how they
    differ. The score is high where it says the same of both sides. The unsteered texts are written
    once, and those of the adapters side by side.

    Args:
        adapters: what `generate` takes.
        vectors: likewise, as many rows, in the same order; `layer` is theirs where they do not know
            it.
        prompts: held out from the adapters' training; 96 for six batches of 16.
        n_batches: on each side, drawn independently, so that no description meets one of the same
            prompts by design.

    Returns:
        One for each adapter. Texts of one prompt have the same number of tokens on both sides.

    Raises:
        ValueError: fewer prompts than batches, other numbers of rows, nothing written on one side.
        NoAnswer: a description is empty.

    Source: "Unsupervised discovery of steering vectors" (2025). The null and the equal lengths are
    this package's.
    """
    check_judge(judge)
    checks.at_least(1, n_batches=n_batches)
    checks.seed(seed)
    sides = _sides(adapters, vectors, layer)
    counts = [len(steering_rows(model, *side, [1.0])) for side in sides.values()]
    if len({*counts}) > 1:
        given = f"adapters, vectors: {counts[0]} and {counts[1]}"
        raise ValueError(f"{given}; pass the vectors of each adapter, in the same order")
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "batch_size": batch_size}
    texts, questions = _texts(model, sides, prompts, counts[0], chat, options), []
    cut = [_equally_long(model, some) for some in texts]
    for number, some in enumerate(cut):
        if len(some) < n_batches:
            of = f" of adapter {number}" if len(cut) > 1 else ""
            raise ValueError(
                f"prompts: {len(some)} of {len(texts[0])} have a text on both sides{of}, but "
                f"n_batches={n_batches}; pass more prompts, or ask for fewer batches"
            )
        for name in sides:
            order = random.Random(f"{seed} {name}").sample(range(len(some)), len(some))
            # A random partition, sizes as equal as can be.
            batches = [some.iloc[order[first::n_batches]] for first in range(n_batches)]
            questions += [_question(batch, name) for batch in batches]
    described = ask(judge, questions)
    if empty := [number for number, text in enumerate(described) if not text]:
        what = f"descriptions {empty} of {len(described)} are empty"
        raise NoAnswer(f"judge: {what}; ask another judge")
    found = []
    for some in cut:
        said, described = described[: 2 * n_batches], described[2 * n_batches :]
        one, other = said[:n_batches], said[n_batches:]
        score = linearity_score(one, other, embedder)
        found.append(Linearity(**vars(score), of_adapter=one, of_vectors=other, texts=Table(some),
                               left_out=len(texts[0]) - len(some)))  # fmt: skip
    return found


def _sides(adapters: Any, vectors: Any, layer: int | None) -> dict[str, tuple[Any, int | None]]:
    """Both sides with their layers: an adapter and a library know theirs."""
    own = layer if isinstance(adapters, Tensor) else None
    return {"adapter": (adapters, own), "vectors": (vectors, layer)}


def _texts(
    model: Model,
    sides: dict[str, tuple[Any, int | None]],
    prompts: Sequence[str],
    count: int,
    chat: bool | None,
    options: dict[str, Any],
) -> list[pd.DataFrame]:
    """Of each adapter: what is written under it, under its vectors and unsteered."""
    frames = {
        name: generate(model, prompts, *side, chat=chat, **options) for name, side in sides.items()
    }
    ways = {frame.attrs["chat"] for frame in frames.values()}
    if len(ways) > 1:
        raise ValueError("chat: adapter and vectors differ in it; pass chat=True or chat=False")
    unsteered = generate(model, prompts, chat=ways.pop(), **options)
    texts = []
    for number in range(count):
        each = {name: [*frame["completion"][number::count]] for name, frame in frames.items()}
        own = {"prompt": unsteered["prompt"], **each, "unsteered": unsteered["completion"]}
        texts.append(pd.DataFrame(own))
    return texts


def _equally_long(model: Model, texts: pd.DataFrame) -> pd.DataFrame:
    """The texts of both sides cut to the shorter one's tokens, where neither is empty."""
    rows = []
    for row in texts.to_dict("records"):
        tokens = {side: tokens_of(model, row[side]) for side in ("adapter", "vectors")}
        length = min(map(len, tokens.values()))
        if length:
            cut = {side: model.tokenizer.decode(some[:length]) for side, some in tokens.items()}
            rows.append({**row, **cut})
    return pd.DataFrame(rows, columns=texts.columns)


def _question(batch: pd.DataFrame, side: str) -> str:
    pairs = [
        _PAIR.format(number=number, unsteered=row["unsteered"].strip(), steered=row[side].strip())
        for number, row in enumerate(batch.to_dict("records"), start=1)
    ]
    return _QUESTION.format(n=len(pairs), pairs="\n\n".join(pairs))


@shape_checked
def linearity_score(
    descriptions_a: Sequence[str], descriptions_b: Sequence[str], embedder: Embedder | None = None
) -> Score:
    """How alike two sets of descriptions are, in the best one-to-one matching of them.

    Raises:
        ValueError: none, or not as many on both sides.
        ModuleNotFoundError: scipy, or what the embedder needs, is not installed.
    """
    _check(descriptions_a, descriptions_b)
    texts = [*descriptions_a, *descriptions_b]
    points = embeddings(texts, embedder or default_embedder()).double()
    return _score(points[: len(descriptions_a)], points[len(descriptions_a) :])


def _check(a: Sequence[str], b: Sequence[str]) -> None:
    if isinstance(a, str) or isinstance(b, str) or len(a) != len(b) or not a:
        given = f"descriptions_a, descriptions_b: {len(a)} and {len(b)}"
        raise ValueError(f"{given}; pass two lists of the same, positive length")


def _score(a: Tensor, b: Tensor) -> Score:
    matrix = (a @ b.T).clamp(-1, 1)
    solver = checks.installed("scipy.optimize", "linearity_score")
    rows, matched = solver.linear_sum_assignment(matrix.numpy(), maximize=True)
    partners = matrix[rows, matched]
    score, half = float(partners.mean()), 0.0
    if len(partners) > 1:
        student = checks.installed("scipy.stats", "linearity_score").t
        width = float(student.ppf((1 + _CONFIDENCE) / 2, len(partners) - 1))
        half = width * float(partners.std()) / len(partners) ** 0.5
    low, high = max(-1.0, score - half), min(1.0, score + half)
    return Score(matrix, matched.tolist(), score, low, high)


@shape_checked
def linearity_null(
    of_adapters: Sequence[Sequence[str]],
    of_vectors: Sequence[Sequence[str]],
    embedder: Embedder | None = None,
) -> pd.DataFrame:
    """The scores of several adapters, beside those between different ones: the null.

        scores = tm.evaluation.linearities(model, ...)
        tm.evaluation.linearity_null(
            [each.of_adapter for each in scores], [each.of_vectors for each in scores]
        )

    Returns:
        A row for each adapter: adapter, its number; score; null_mean, null_low and null_high, the
        mean and range of the scores of its texts with others' vectors, and of its vectors with
        others' texts; p_value, the chance that its own score is as high among these. `attrs` holds
        the matrix of all `scores`, as lists: adapters down, vectors across.

    Raises:
        ValueError: fewer than two adapters, or not as many descriptions everywhere.
    """
    count = len(of_adapters)
    if count != len(of_vectors) or count < 2:
        given = f"of_adapters, of_vectors: {count} and {len(of_vectors)} sets"
        raise ValueError(f"{given}; pass those of at least two adapters, as many on both sides")
    for some in (*of_adapters, *of_vectors):
        _check(of_adapters[0], some)
    flat = [text for some in (*of_adapters, *of_vectors) for text in some]
    points = embeddings(flat, embedder or default_embedder()).double()
    sets = points.reshape(2, count, len(of_adapters[0]), -1)
    scores = torch.tensor([[_score(a, b).score for b in sets[1]] for a in sets[0]])
    rows = []
    for i in range(count):
        others = [j for j in range(count) if j != i]
        null = torch.cat([scores[i, others], scores[others, i]])
        own = float(scores[i, i])
        p_value = (1 + int((null >= own).sum())) / (1 + len(null))
        rows.append((i, own, float(null.mean()), float(null.min()), float(null.max()), p_value))
    columns = ["adapter", "score", "null_mean", "null_low", "null_high", "p_value"]
    table = Table(rows, columns=columns)
    table.attrs["scores"] = scores.tolist()
    return table
