"""How many different effects have the vectors? Completions grouped into behaviours."""

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch

from tl_melbo import checks
from tl_melbo.analysis._coherence import DEFAULT_PERPLEXITY, DEFAULT_REPETITION, judged
from tl_melbo.analysis._embedding import Embedder, default_embedder, embeddings
from tl_melbo.model.bridge import Model, check_model
from tl_melbo.shapes import shape_checked
from tl_melbo.tables import Table
from tl_melbo.text import printable, quoted

# Average-linkage clusters are cut where two are this far apart (one minus the mean cosine). These
# numbers are where the hand-labelled completions of the tests agree best; neighbours do nearly so.
DEFAULT_DISTANCES = {"sentences": 0.65, "words": 0.85}
_DISTANCE_OF_OTHERS = 0.5
_INCOHERENT, _UNSTEERED = -1, 0
_NAME_WORDS, _LONGEST_WORD = 3, 24
# A word of a name. Not "i'm", "don't" or "you're": they are no topics.
_WORD = r"(?u)(?<!['’])\b[^\W\d_][\w-]+\b(?!['’](?:t|m|d|ll|re|ve)\b)"
_MOST_CHARACTERS = 2_000
_GROUP_COLUMNS = ["behaviour", "name", "prompt", "n_texts", "vectors", "example"]


@dataclass(frozen=True, eq=False)
class Behaviours:
    """Completions in groups, each group one behaviour; see `behaviours`.

    Attributes:
        texts: the completions, with perplexity, repetition, coherent, filtered_out (why not, or
            "") and behaviour, the number of the group: 0 for the baseline's, -1 if not coherent.
        groups: behaviour, name, prompt, n_texts, vectors, example; for each prompt the baseline's
            first, then the largest.
        embedder: "sentences", "words", or "custom".
    """

    texts: pd.DataFrame
    groups: pd.DataFrame
    embedder: str

    @property
    def n_distinct(self) -> int:
        """How many behaviours are coherent and differ from the baseline, over all prompts."""
        return sum(number > _UNSTEERED for number in self.groups["behaviour"])

    @property
    def per_100_vectors(self) -> float:
        """The same for every hundred vectors and prompts."""
        steered = self.texts[self.texts["vector"] >= 0]
        n_tried = len({*zip(steered["vector"], steered["prompt"], strict=True)})
        return 100 * self.n_distinct / n_tried if n_tried else 0.0

    def __repr__(self) -> str:
        n_incoherent = sum(not coherent for coherent in self.texts["coherent"])
        found = f"{self.n_distinct} distinct in {len(self.texts)} completions"
        return f"Behaviours({found}, {n_incoherent} not coherent, by {self.embedder})"


@shape_checked
def behaviours(
    model: Model,
    completions: pd.DataFrame,
    *,
    chat: bool | None = None,
    n_behaviours: int | None = None,
    distance: float | None = None,
    largest_perplexity: float = DEFAULT_PERPLEXITY,
    largest_repetition: float = DEFAULT_REPETITION,
    embedder: Embedder | None = None,
    batch_size: int = 32,
) -> Behaviours:
    """Group what the model writes under many vectors into distinct behaviours.

    Completions that repeat themselves or have a high perplexity under the unsteered model are
    filtered out. The others are clustered for each prompt by itself (average linkage).

    Args:
        completions: as `generate` returns them; the first 2,000 characters of each count.
        chat: None takes what `generate` noted in the frame, or else raw prompts.
        n_behaviours: groups for each prompt, the baseline's included; None goes by `distance`.
        distance: one minus the mean cosine, beyond which two groups stay apart; None takes 0.65 for
            sentences, 0.85 for words.

    Raises:
        ValueError: completions or columns are missing; a number out of its range; fewer coherent
            completions than `n_behaviours`.
        ModuleNotFoundError: scikit-learn, or what the embedder needs, is not installed.
    """
    check_model(model)
    chosen: Embedder = embedder or default_embedder()
    label = "custom" if callable(chosen) else chosen
    if distance is None:
        distance = DEFAULT_DISTANCES.get(label, _DISTANCE_OF_OTHERS)
    _check(completions)
    checks.at_least(1, n_behaviours=n_behaviours, batch_size=batch_size)
    checks.positive(distance=distance)
    checks.between(0, 2, "2 is opposite", distance=distance)
    checks.between(1, math.inf, "a perplexity", largest_perplexity=largest_perplexity)
    checks.between(0, 1, "a share", largest_repetition=largest_repetition)
    chat = bool(completions.attrs.get("chat")) if chat is None else chat
    texts = Table(completions).reset_index(drop=True)
    said = texts["completion"].fillna("").astype(str).str[:_MOST_CHARACTERS].map(printable)
    pairs = list(zip(texts["prompt"], said, strict=True))
    measured = judged(model, pairs, chat, largest_perplexity, largest_repetition, batch_size)
    texts[[*measured.columns]] = measured
    texts["coherent"] = texts["filtered_out"] == ""
    texts["behaviour"] = _INCOHERENT
    groups: list[tuple[Any, ...]] = []
    inside = texts.assign(said=said)[texts["coherent"] | (texts["vector"] < 0)]
    for prompt, rows in inside.groupby("prompt", sort=False):
        first = 1 + max([_UNSTEERED, *(group[0] for group in groups)])
        clusters = _clusters(str(prompt), rows["said"].tolist(), n_behaviours, distance, chosen)
        # The unsteered completion's cluster is 0; of the others, the largest comes first.
        own = {*itertools.compress(clusters, rows["vector"] < 0)}
        others = [each for each, _ in Counter(clusters).most_common() if each not in own]
        number_of = dict.fromkeys(own, _UNSTEERED) | dict(zip(others, itertools.count(first)))
        numbers = [number_of[cluster] for cluster in clusters]
        texts.loc[rows.index, "behaviour"] = numbers
        groups += _groups(str(prompt), rows.assign(behaviour=numbers))
    return Behaviours(texts, Table(groups, columns=_GROUP_COLUMNS), label)


def _check(completions: pd.DataFrame) -> None:
    advice = "pass what generate or report.collect_completions returns"
    checks.columns(completions, ("vector", "prompt", "completion"), "completions", advice)
    if (kind := completions["vector"].dtype).kind not in "iu":
        raise ValueError(f"completions: vector holds {kind}, expected whole numbers; {advice}")
    for row, prompt in enumerate(completions["prompt"]):
        if not isinstance(prompt, str):
            raise ValueError(f"completions: prompt of row {row} is {prompt!r}, expected a text")


def _clusters(
    prompt: str, texts: Sequence[str], n_behaviours: int | None, distance: float, embedder: Embedder
) -> list[int]:
    cluster = checks.installed("sklearn.cluster", "behaviours")
    if n_behaviours is not None and len(texts) < n_behaviours:
        found = f"of {quoted(printable(prompt))} only {len(texts)} completions are coherent"
        raise ValueError(f"n_behaviours={n_behaviours}: {found}; ask for fewer, or for None")
    if len(texts) == 1:
        return [0]
    # What is said counts, and how: meaning alone throws all that an assistant says together.
    points = [embeddings(texts, embedder).double()]
    if embedder == "sentences":
        points.append(embeddings(texts, "words").double())
    cosines = torch.stack([some @ some.T for some in points]).mean(0)
    clustering = cluster.AgglomerativeClustering(
        n_clusters=n_behaviours,
        distance_threshold=distance if n_behaviours is None else None,
        metric="precomputed",
        linkage="average",
    )
    return clustering.fit_predict((1 - cosines).clamp_min(0).numpy()).tolist()


def _groups(prompt: str, rows: pd.DataFrame) -> list[tuple[Any, ...]]:
    """What is told of the groups of one prompt, as in _GROUP_COLUMNS."""
    groups = []
    for number, members in rows.groupby("behaviour"):
        texts = members["said"].tolist()
        others = rows["said"][rows["behaviour"] != number].tolist()
        name = "≈ baseline" if number == _UNSTEERED else _name(texts, others)
        vectors = sorted({int(vector) for vector in members["vector"] if vector >= 0})
        example = members["said"][members["perplexity"].idxmin()]
        groups.append((number, name, prompt, len(texts), vectors, example))
    return groups


def _name(texts: Sequence[str], others: Sequence[str]) -> str:
    """Words of these texts that most of them have and few of the others, as they come up."""
    text = checks.installed("sklearn.feature_extraction.text", "behaviours")
    counts = text.CountVectorizer(binary=True, token_pattern=_WORD)
    words = dict.fromkeys(counts.build_analyzer()(" ".join(texts)))
    if not words:
        return "without words"
    found = counts.fit_transform([*texts, *others])
    scores = found[: len(texts)].toarray().mean(0)
    if others:
        scores -= found[len(texts) :].toarray().mean(0)
    telling = [word for word in words if word not in text.ENGLISH_STOP_WORDS] or words
    best = sorted(telling, key=lambda word: -scores[counts.vocabulary_[word]])
    # A script without spaces makes one word of a sentence.
    return ", ".join(word[:_LONGEST_WORD] for word in best[:_NAME_WORDS])
