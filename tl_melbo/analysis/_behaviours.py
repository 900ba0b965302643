"""How many different things do they make the model do? Completions grouped into behaviours."""

import math
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from tl_melbo import checks
from tl_melbo.analysis._embedding import Embedder, default_embedder, embeddings
from tl_melbo.analysis._scaling import repetition_of
from tl_melbo.memory import map_batches
from tl_melbo.model.bridge import Model, check_model, frozen, whole_model
from tl_melbo.model.tokens import context_length, to_tokens
from tl_melbo.probability import mean_losses
from tl_melbo.shapes import shape_checked
from tl_melbo.text import printable

# Average-linkage clusters are cut where two are this far apart (one minus the mean cosine). These
# numbers are where the hand-labelled completions of the tests agree best; neighbours do nearly so.
DEFAULT_DISTANCES = {"sentences": 0.65, "words": 0.85}
_DISTANCE_OF_OTHERS = 0.5
DEFAULT_PERPLEXITY = 11.0
DEFAULT_REPETITION = 0.4
# A short text, whose perplexity hangs on a few words, may be surprising, up to so many nats in all
# beyond the limit, if its words in another order are more so: tokens, nats, and nats a token.
COHERENCE_OF_SHORT = {"tokens": 25, "surprise": 55.0, "order": 1.0}
_SHUFFLES = 4
INCOHERENT = -1
_UNSTEERED = 0
_NAME_WORDS, _LONGEST_WORD = 3, 24
# Why a text is put aside.
EMPTY, REPEATS, SURPRISING = "empty", "repeats itself", "surprising"
# Of a longer text, its beginning is looked at.
_MOST_CHARACTERS = 2_000


@dataclass(frozen=True, eq=False)
class Behaviours:
    """Completions in groups, each group one behaviour; see `behaviours`.

    Attributes:
        texts: the completions as they came, and for each: perplexity; repetition, the share of its
            runs of three tokens that came before; coherent; put_aside, why it is not: "empty",
            "repeats itself" or "surprising", else ""; and the number of its behaviour: 0 where it
            is grouped with the unsteered text, -1 where it is not coherent. The unsteered text
            itself is always 0.
        groups: one row a behaviour, the largest first, that of the unsteered text before them:
            behaviour, name, prompt, n_texts, vectors, example.
        embedder: what made points of the texts: "sentences", "words", or "custom".
    """

    texts: pd.DataFrame
    groups: pd.DataFrame
    embedder: str

    @property
    def n_distinct(self) -> int:
        """How many behaviours there are that hold together and are not near the unsteered text.

        Those of several prompts are added up: what a vector does on one is another text on another.
        """
        return sum(number > _UNSTEERED for number in self.groups["behaviour"])

    @property
    def per_100_vectors(self) -> float:
        """The same for every hundred vectors on each prompt; 0 where there are none.

        Compare libraries of one size: the more vectors, the more of them repeat what another does.
        """
        steered = zip(self.texts["vector"], self.texts["prompt"], strict=True)
        n_tried = len({(vector, prompt) for vector, prompt in steered if vector >= 0})
        return 100 * self.n_distinct / n_tried if n_tried else 0.0

    def __repr__(self) -> str:
        n_incoherent = sum(not coherent for coherent in self.texts["coherent"])
        return (
            f"Behaviours({self.n_distinct} distinct in {len(self.texts)} completions, "
            f"{n_incoherent} not coherent, by {self.embedder})"
        )


@shape_checked
def behaviours(
    model: Model,
    completions: pd.DataFrame,
    *,
    chat: bool = True,
    n_behaviours: int | None = None,
    distance: float | None = None,
    largest_perplexity: float = DEFAULT_PERPLEXITY,
    largest_repetition: float = DEFAULT_REPETITION,
    embedder: Embedder | None = None,
    batch_size: int = 8,
) -> Behaviours:
    """Group what the model writes under many vectors into distinct behaviours.

        texts = tm.report.collect_completions(model, prompt, found)
        tm.analysis.behaviours(model, texts[texts["scale"] >= 0]).groups

    Texts that do not hold together are put aside: those that repeat themselves, and those that the
    unsteered model, given the prompt, finds too surprising. What it would never say is not yet
    gibberish: a surprising text of up to 25 tokens stays if the order of its words makes sense to
    the model (shuffled, they surprise it more by 1 nat a token), and it is not too far beyond the
    limit (by 55 nats in all). One or two words have no order, and a model of one language judges
    long texts in others badly: look at what was put aside as "surprising", too.

    The others are clustered by what they say (average linkage; with the embedder "sentences" over
    the mean of two cosines, that of the sentences' embeddings and that of the words), for each
    prompt by itself. Which texts go together hangs on all that are there. A group is named after
    the words that set it apart from the unsteered text and from the other groups.

    Args:
        model: the model that wrote them; it is not steered here.
        completions: as `generate` or `report.collect_completions` return them: the columns vector
            (-1 for unsteered), prompt, completion. Every row is one text to group; of a long one,
            the first 2,000 characters.
        chat: whether the prompts were formatted as chat.
        n_behaviours: how many groups to make for each prompt, that of the unsteered text included;
            None lets `distance` decide.
        distance: two groups stay apart if one minus the mean cosine between them is more; None
            takes 0.65 for sentences, 0.85 for words.
        largest_perplexity: of a text that is coherent anyway, under the unsteered model after the
            prompt; see above.
        largest_repetition: of a coherent text, the share of its runs of three tokens that came
            before.
        embedder: see `embeddings`; None takes sentences where the embedder is installed.
        batch_size: texts at once when perplexity is measured.

    Returns:
        The texts with their groups, and the groups. Where no text is coherent, no group but the
        unsteered one's, if that text was given.

    Raises:
        ValueError: no completions or without those columns; a number out of its range; fewer
            coherent texts than `n_behaviours`.
        ModuleNotFoundError: scikit-learn, or what the embedder needs, is not installed.
    """
    from tl_melbo.tables import Table

    check_model(model)
    _check(completions, n_behaviours, distance, largest_perplexity, largest_repetition)
    checks.batch_size(batch_size)
    chosen: Embedder = default_embedder() if embedder is None else embedder
    label = "custom" if callable(chosen) else chosen
    if distance is None:
        distance = DEFAULT_DISTANCES.get(label, _DISTANCE_OF_OTHERS)
    texts = Table(completions).reset_index(drop=True)
    whole = texts["completion"].fillna("").astype(str)
    written = [printable(text[:_MOST_CHARACTERS]) for text in whole]
    asked = texts["prompt"].astype(str).tolist()
    pairs = list(zip(asked, written, strict=True))
    measured = perplexities(model, list(dict.fromkeys(pairs)), chat, batch_size)
    texts["perplexity"] = [measured[pair] for pair in pairs]
    texts["repetition"] = [repetition_of(model, text) for text in written]
    surprising = [
        pair
        for pair, perplexity in measured.items()
        if perplexity > largest_perplexity or perplexity == math.inf
    ]
    sensible = _sensible(
        model, surprising, measured, math.log(largest_perplexity), chat, batch_size
    )
    nonsense = {*surprising} - sensible
    texts["put_aside"] = [
        EMPTY if not pair[1].strip()
        else REPEATS if repetition > largest_repetition
        else SURPRISING if pair in nonsense
        else ""
        for pair, repetition in zip(pairs, texts["repetition"], strict=True)
    ]  # fmt: skip
    texts["coherent"] = texts["put_aside"] == ""
    texts["behaviour"] = INCOHERENT
    groups, next_number = [], _UNSTEERED + 1
    for prompt in dict.fromkeys(texts["prompt"]):
        is_unsteered = texts["vector"] < 0
        inside = (texts["prompt"] == prompt) & (texts["coherent"] | is_unsteered)
        rows = pd.DataFrame(texts[inside])
        if rows.empty:
            continue
        # Not the completions, which may be long or hold what cannot be shown.
        said = pd.Series([written[place] for place in rows.index], rows.index)
        clusters = _clusters(str(prompt), said.tolist(), n_behaviours, distance, chosen)
        unsteered = np.array([vector < 0 for vector in rows["vector"]])
        numbers = _numbered(clusters, unsteered, next_number)
        texts.loc[rows.index, "behaviour"] = numbers
        for number in sorted({*numbers.tolist()}):
            members = pd.DataFrame(rows[numbers == number])
            own, others = said[numbers == number].tolist(), said[numbers != number].tolist()
            groups.append(_group(number, str(prompt), members, own, others))
            next_number = max(next_number, number + 1)
    table = Table(groups, columns=["behaviour", "name", "prompt", "n_texts", "vectors", "example"])
    return Behaviours(texts, table, label)


def _check(
    completions: pd.DataFrame,
    n_behaviours: int | None,
    distance: float | None,
    largest_perplexity: float,
    largest_repetition: float,
) -> None:
    advice = "pass what generate or report.collect_completions returns"
    checks.columns(completions, ("vector", "prompt", "completion"), "completions", advice)
    if not pd.api.types.is_integer_dtype(completions["vector"]):
        raise ValueError(
            f"completions: vector holds {completions['vector'].dtype}, expected whole numbers, -1 "
            f"for unsteered; {advice}"
        )
    for row, prompt in enumerate(completions["prompt"]):
        if not isinstance(prompt, str):
            raise ValueError(f"completions: prompt of row {row} is {prompt!r}, expected a text")
    checks.at_least(1, n_behaviours=n_behaviours)
    if distance is not None and not 0 < distance <= 2:
        raise ValueError(f"distance={distance}: above 0, and at most 2, which is opposite")
    if not largest_perplexity >= 1:
        raise ValueError(
            f"largest_perplexity={largest_perplexity}: at least 1; "
            f"{DEFAULT_PERPLEXITY:g} by default"
        )
    checks.between(0, 1, "a share", largest_repetition=largest_repetition)


def perplexities(
    model: Model, pairs: Sequence[tuple[str, str]], chat: bool, batch_size: int
) -> dict[tuple[str, str], float]:
    """Of each completion after its prompt; infinite for one that holds nothing."""
    prompts = {prompt: to_tokens(model, prompt, chat) for prompt in {pair[0] for pair in pairs}}
    found = dict.fromkeys(pairs, math.inf)
    # Rows of one shape run together, so that none needs padding.
    groups: dict[tuple[int, int], list[tuple[tuple[str, str], Tensor]]] = {}
    for prompt, text in pairs:
        before = prompts[prompt]
        written = model.tokenizer.encode(text, add_special_tokens=False) if text.strip() else []
        if room := context_length(model):
            written = written[: max(0, room - before.shape[1])]
        if written:
            row = torch.cat([before, torch.tensor([written], device=before.device)], 1)
            shape = (before.shape[1], len(written))
            groups.setdefault(shape, []).append(((prompt, text), row))
    for (n_before, _), group in groups.items():

        def losses(rows: Tensor, n_before: int = n_before) -> Tensor:
            with torch.no_grad(), frozen(*whole_model(model)):
                logits = model(rows)[:, n_before - 1 : -1]
            return mean_losses(logits, rows[:, n_before:])

        parts, batch_size = map_batches(losses, torch.cat([row for _, row in group]), batch_size)
        for (pair, _), value in zip(group, torch.cat(parts).exp().tolist(), strict=True):
            found[pair] = value if math.isfinite(value) else math.inf
    return found


def _sensible(
    model: Model,
    surprising: Sequence[tuple[str, str]],
    measured: dict[tuple[str, str], float],
    limit: float,
    chat: bool,
    batch_size: int,
) -> set[tuple[str, str]]:
    """Those of the surprising texts whose words are in an order that the model expects."""
    shuffled: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for prompt, text in surprising:
        words = text.split()
        n_tokens = len(model.tokenizer.encode(text, add_special_tokens=False))
        beyond = n_tokens * (math.log(measured[prompt, text]) - limit)
        is_short = n_tokens <= COHERENCE_OF_SHORT["tokens"]
        if len(words) > 2 and is_short and beyond <= COHERENCE_OF_SHORT["surprise"]:
            order = random.Random(text)  # the same text is judged alike each time
            shuffled[prompt, text] = [
                (prompt, " ".join(order.sample(words, len(words)))) for _ in range(_SHUFFLES)
            ]
    every = dict.fromkeys(pair for some in shuffled.values() for pair in some)
    mixed = perplexities(model, list(every), chat, batch_size)

    def gain(pair: tuple[str, str]) -> float:
        losses = [math.log(mixed[other]) for other in shuffled[pair]]
        return sum(losses) / len(losses) - math.log(measured[pair])

    return {pair for pair in shuffled if gain(pair) >= COHERENCE_OF_SHORT["order"]}


def _clusters(
    prompt: str, texts: Sequence[str], n_behaviours: int | None, distance: float, embedder: Embedder
) -> "np.ndarray[Any, Any]":
    try:
        from sklearn.cluster import AgglomerativeClustering
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "grouping texts needs scikit-learn: pip install scikit-learn"
        ) from error
    if n_behaviours is not None and len(texts) < n_behaviours:
        there = "is only 1 text" if len(texts) == 1 else f"are only {len(texts)} texts"
        raise ValueError(
            f"n_behaviours={n_behaviours}: of {printable(prompt[:60])!r} there {there} to group, "
            "the coherent ones and the unsteered; ask for fewer, or for None"
        )
    if len(texts) == 1:
        return np.zeros(1, dtype=int)
    points = embeddings(texts, embedder).double()
    cosines = points @ points.T
    if embedder == "sentences":
        # What is said counts, and how: meaning alone throws all that an assistant says together.
        words = embeddings(texts, "words").double()
        cosines = (cosines + words @ words.T) / 2
    apart = (1 - cosines).clamp_min(0).numpy()
    settings: Any = {"n_clusters": n_behaviours}  # None is allowed, whatever its stub says
    return AgglomerativeClustering(
        **settings,
        distance_threshold=distance if n_behaviours is None else None,
        metric="precomputed",
        linkage="average",
    ).fit_predict(apart)


def _numbered(
    clusters: "np.ndarray[Any, Any]", unsteered: "np.ndarray[Any, Any]", first: int
) -> "np.ndarray[Any, Any]":
    """Clusters as numbers of behaviours: the unsteered text's is 0, the largest others first."""
    own = {*clusters[unsteered].tolist()}
    sizes = {int(cluster): int((clusters == cluster).sum()) for cluster in clusters}
    others = sorted((c for c in sizes if c not in own), key=lambda cluster: -sizes[cluster])
    number_of = dict.fromkeys(own, _UNSTEERED) | {
        cluster: first + place for place, cluster in enumerate(others)
    }
    return np.array([number_of[int(cluster)] for cluster in clusters])


def _group(
    number: int,
    prompt: str,
    members: pd.DataFrame,
    texts: Sequence[str],
    others: Sequence[str],
) -> dict[str, Any]:
    by_perplexity = sorted(range(len(texts)), key=lambda i: members["perplexity"].iloc[i])
    return {
        "behaviour": number,
        "name": "near the unsteered text" if number == _UNSTEERED else _name(texts, others),
        "prompt": prompt,
        "n_texts": len(texts),
        "vectors": sorted({int(vector) for vector in members["vector"] if vector >= 0}),
        "example": texts[by_perplexity[0]],
    }


def _name(texts: Sequence[str], others: Sequence[str]) -> str:
    """Words of these texts that most of them have and few of the others, as they come up."""
    from sklearn.feature_extraction.text import CountVectorizer

    def shares(stop_words: str | None) -> dict[str, float]:
        # Not "i'm", "don't" or "you're": they are no topics.
        word = r"(?u)(?<!['’])\b[^\W\d_][\w-]+\b(?!['’](?:t|m|d|ll|re|ve)\b)"
        counts = CountVectorizer(binary=True, stop_words=stop_words, token_pattern=word)
        matrix: Any = counts.fit_transform([*texts, *others])
        found = matrix.toarray()
        inside = found[: len(texts)].mean(0)
        outside = found[len(texts) :].mean(0) if others else 0 * inside
        names = counts.get_feature_names_out()
        return {
            name: float(here - there)
            for name, here, there in zip(names, inside, outside, strict=True)
            if here > 0
        }

    together = " ".join(texts).lower()

    def first(word: str) -> int:
        found = re.search(rf"\b{re.escape(word)}\b", together)
        return found.start() if found else len(together)

    for stop_words in ("english", None):
        try:
            scores = shares(stop_words)
        except ValueError:  # no word is left
            continue
        if scores:
            best = sorted(scores, key=lambda word: (-scores[word], first(word)))
            # A script without spaces makes one word of a sentence.
            return ", ".join(word[:_LONGEST_WORD] for word in best[:_NAME_WORDS])
    return "without words"
