"""How many different effects have the vectors? Completions grouped into behaviours."""

import itertools
import math
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from tl_melbo import checks
from tl_melbo.analysis._coherence import DEFAULT_PERPLEXITY, DEFAULT_REPETITION, judged
from tl_melbo.analysis._embedding import Embedder, default_embedder, embeddings
from tl_melbo.analysis._naming import (
    BASELINE,
    judged_names,
    judged_stances,
    rule_name,
    unique,
    without,
)
from tl_melbo.analysis._rates import sampled
from tl_melbo.analysis._tagged import is_first, is_unsteered, tagged, unsteered_of
from tl_melbo.analysis._tags import MOST_CHARACTERS, TAGS
from tl_melbo.generation import OnBatch
from tl_melbo.judges._asking import Judge, check_optional_judge
from tl_melbo.model.bridge import Model, check_model
from tl_melbo.model.tokens import default_system_prompt
from tl_melbo.probability import wilson_interval
from tl_melbo.shapes import shape_checked
from tl_melbo.tables import Table
from tl_melbo.tables import groups as groups_of
from tl_melbo.text import printable, quoted

# Average-linkage clusters are cut where two are this far apart (one minus the mean cosine). These
# numbers are where the hand-labelled completions of the tests agree best; neighbours do nearly so.
DEFAULT_DISTANCES = {"sentences": 0.83, "words": 0.85}
_DISTANCE_OF_OTHERS = 0.5
# Two texts of different speakers are so much farther apart. Where stance or form tells more than
# what is spoken of, as in code or a refusal, speakers do not count and distances are so much less.
_OTHER_SPEAKER, _WITHIN = 0.2, 0.9
_TELLING = ("refuses", "echoes the prompt", "leaks the system prompt")
# Two texts of different stance or form: farther than any limit.
_NEVER = 10.0
_INCOHERENT, _UNSTEERED = -1, 0
_KINDS = (
    ("vector", "iu", "whole numbers"), ("scale", "iuf", "numbers"), ("sample", "iuf", "numbers"),
    ("control", "b", "true or false in every row"),
)  # fmt: skip
_GROUP_COLUMNS = [
    "behaviour", "name", "prompt", "n_texts", "vectors", "negatives", "example", "stance", "form",
]  # fmt: skip
_VECTOR_COLUMNS = [
    "vector", "scale", "prompt", "behaviour", "name", "n", "n_samples", "rate", "low", "high",
]  # fmt: skip


@dataclass(frozen=True, eq=False)
class Behaviours:
    """Completions in groups, each group one behaviour; see `behaviours`.

    Attributes:
        texts: the completions, with perplexity, repetition, coherent, filtered_out (why not, or
            ""); stance, form and speaker, see `tags`; baseline, whether the text is an unsteered
            one's verbatim; and behaviour, the number of the group: 0 for that of the greedy
            unsteered completion, or, without one, of most unsteered samples; -1 if not coherent.
        groups: behaviour, name, prompt, n_texts, vectors, negatives (the vectors whose negated
            texts are in it), example, stance, form; for each prompt the baseline's first, then the
            largest. Names are unique within a prompt.
        embedder: "sentences", "words", or "custom".
    """

    texts: pd.DataFrame
    groups: pd.DataFrame
    embedder: str

    @property
    def n_distinct(self) -> int:
        """How many behaviours of vectors are coherent and not the baseline, over all prompts."""
        columns = (self.groups[name] for name in ("behaviour", "vectors", "negatives"))
        groups = zip(*columns, strict=True)
        return sum(n > _UNSTEERED and bool(some or others) for n, some, others in groups)

    @property
    def per_100_vectors(self) -> float:
        """The same for every hundred vectors, signs and prompts: v and -v are two tries."""
        steered = self.texts[~(is_unsteered(self.texts) | _is_control(self.texts))]
        signs = steered["scale"] > 0
        n_tried = len({*zip(steered["vector"], signs, steered["prompt"], strict=True)})
        return 100 * self.n_distinct / n_tried if n_tried else 0.0

    @property
    def of_vectors(self) -> Table:
        """How often each vector brings out each behaviour, the most frequent first.

        Its columns: vector (-1 for unsteered), scale, prompt, behaviour (-1: not coherent), name;
        n, of n_samples texts; rate, with low and high, Wilson's 95% interval. Where there are
        samples, the greedy completion is not counted.
        """
        named = zip(self.groups["prompt"], self.groups["behaviour"], strict=True)
        names = dict(zip(named, self.groups["name"], strict=True))
        rows = []
        texts = sampled(pd.DataFrame(self.texts[~_is_control(self.texts)]))
        for key, some in groups_of(texts, ["vector", "scale", "prompt"]).items():
            for number, n in Counter(some["behaviour"]).most_common():
                name = names.get((key[-1], number), "not coherent")
                bounds = wilson_interval(n, len(some))
                rows.append((*key, number, name, n, len(some), n / len(some), *bounds))
        return Table(rows, columns=_VECTOR_COLUMNS)

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
    judge: Judge | None = None,
    on_batch: OnBatch | None = None,
) -> Behaviours:
    """Group what the model writes under many vectors, and their negatives, into behaviours.

    Completions that repeat themselves or have a high perplexity under the unsteered model are
    filtered out. The others are clustered for each prompt by itself (average linkage), without
    what they share with the prompt. Different stance or form (see `tags`) is different behaviour.

    Args:
        completions: as `generate` returns them, at any scales, with samples or without; the first
            2,000 characters of each count. Without a column "scale", all are of scale 1. Without
            unsteered rows there is no baseline, and what it does counts as a behaviour, too. Rows
            that are true in a column "control", such as texts of random vectors, are grouped with
            the others, but are no vectors of a group, and name none that has others.
        chat: None takes what `generate` noted in the frame, or else raw prompts.
        n_behaviours: groups for each prompt, the baseline's included; None goes by `distance`.
        distance: one minus the mean cosine, beyond which two groups stay apart; None takes 0.83 for
            sentences, 0.85 for words.
        embedder: see `embeddings`; None takes "sentences" where it is installed, or else "words". A
            function of your own is given whole texts, with the prompt's words in them.
        judge: says the stance of each text and the name of each group, in place of the rules,
            wherever its answer can be used.
        on_batch: called with the different texts read, and those in all, after each batch.

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
    check_optional_judge(judge)
    checks.at_least(1, n_behaviours=n_behaviours, batch_size=batch_size)
    checks.positive(distance=distance)
    checks.between(0, 2, "2 is opposite", distance=distance)
    checks.between(1, math.inf, "a perplexity", largest_perplexity=largest_perplexity)
    checks.between(0, 1, "a share", largest_repetition=largest_repetition)
    chat = bool(completions.attrs.get("chat")) if chat is None else chat
    texts = _with_scale(completions)
    said = texts["completion"].fillna("").astype(str).str[:MOST_CHARACTERS].map(printable)
    pairs = list(zip(texts["prompt"], said, strict=True))
    limits = (largest_perplexity, largest_repetition)
    measured = judged(model, pairs, chat, *limits, batch_size, on_batch)
    texts[[*measured.columns]] = measured
    texts["coherent"] = texts["filtered_out"] == ""
    system = default_system_prompt(model) if chat else None
    texts[[*TAGS]] = tagged(pairs, unsteered_of(texts, said.tolist()), system)
    if judge is not None:
        texts["stance"] = judged_stances(judge, pairs, texts["stance"])
    texts["baseline"] = _is_baseline(texts)
    texts["behaviour"] = _INCOHERENT
    groups: list[tuple[Any, ...]] = []
    firsts = is_first(texts)
    inside = pd.DataFrame(texts.assign(said=said, is_first=firsts)[texts["coherent"] | firsts])
    for (prompt,), rows in groups_of(inside, ["prompt"]).items():
        first = 1 + max([_UNSTEERED, *(group[0] for group in groups)])
        cosines = _cosines(str(prompt), rows["said"].tolist(), chosen)
        clusters = _clusters(str(prompt), rows, cosines, n_behaviours, distance)
        # The unsteered completion's cluster, or that of most samples, is 0; then the largest comes.
        votes = rows["is_first"] & rows["coherent"]
        votes = votes if votes.any() else rows["is_first"]
        own = [each for each, _ in Counter(itertools.compress(clusters, votes)).most_common(1)]
        whole = itertools.compress(clusters, rows["coherent"])
        others = [each for each, _ in Counter(whole).most_common() if each not in own]
        number_of = dict.fromkeys(own, _UNSTEERED) | dict(zip(others, itertools.count(first)))
        numbers = [
            number_of[cluster] if is_whole or cluster in own else _INCOHERENT
            for cluster, is_whole in zip(clusters, rows["coherent"], strict=True)
        ]
        texts.loc[rows.index, "behaviour"] = numbers
        groups += _groups(str(prompt), rows.assign(behaviour=numbers), cosines, judge)
    return Behaviours(texts, Table(groups, columns=_GROUP_COLUMNS), label)


def _check(completions: pd.DataFrame) -> None:
    advice = "pass what generate or report.collect_completions returns"
    checks.columns(completions, ("vector", "prompt", "completion"), "completions", advice)
    for name, kinds, wanted in _KINDS:
        if name in completions and (kind := completions[name].dtype).kind not in kinds:
            raise ValueError(f"completions: {name} holds {kind}, expected {wanted}; {advice}")
    for row, prompt in enumerate(completions["prompt"]):
        if not isinstance(prompt, str):
            raise ValueError(f"completions: prompt of row {row} is {prompt!r}, expected a text")


def _with_scale(completions: pd.DataFrame) -> Table:
    texts = Table(Table(completions).reset_index(drop=True))
    if "scale" not in texts:
        texts.insert(1, "scale", (texts["vector"] >= 0).astype(float))
    return texts


def _is_baseline(texts: pd.DataFrame) -> list[bool]:
    written = list(zip(texts["prompt"], texts["completion"], strict=True))
    unsteered = {*itertools.compress(written, is_unsteered(texts))}
    return [each in unsteered for each in written]


def _is_control(texts: pd.DataFrame) -> pd.Series:
    return pd.Series(texts.get("control", False), texts.index)


def _cosines(prompt: str, texts: Sequence[str], embedder: Embedder) -> Tensor:
    """How alike texts are in what they do not have from the prompt."""
    if callable(embedder):
        return _products(embeddings(texts, embedder))
    if embedder == "words":
        return _by_words(prompt, texts)
    *rows, asked = embeddings([*texts, prompt], embedder).double()
    points = torch.stack(rows)
    points = points - (points @ asked)[:, None] * asked
    by_meaning = _products(points)
    # What is said counts, and how: meaning alone throws all that an assistant says together.
    return (by_meaning + _by_words(prompt, texts)) / 2


def _by_words(prompt: str, texts: Sequence[str]) -> Tensor:
    cosines = _products(embeddings([without(text, prompt) for text in texts], "words"))
    # A text without words of its own has no direction.
    return torch.where(_differ(texts) == 0, 1.0, cosines)


def _products(points: Tensor) -> Tensor:
    points = torch.nn.functional.normalize(points.double(), dim=-1)
    return points @ points.T


def _clusters(
    prompt: str, rows: pd.DataFrame, cosines: Tensor, n_behaviours: int | None, distance: float
) -> list[int]:
    cluster = checks.installed("sklearn.cluster", "behaviours")
    if n_behaviours is not None and len(rows) < n_behaviours:
        found = f"of {quoted(printable(prompt))} only {len(rows)} completions are coherent"
        raise ValueError(f"n_behaviours={n_behaviours}: {found}; ask for fewer, or for None")
    if len(rows) == 1:
        return [0]
    tags = list(zip(rows["stance"], rows["form"], strict=True))
    if n_behaviours is not None and n_behaviours < len({*tags}):
        raise ValueError(
            f"n_behaviours={n_behaviours}: the completions of {quoted(printable(prompt))} have "
            f"{len({*tags})} combinations of stance and form, which stay apart; ask for as many"
        )
    tells = torch.tensor([stance in _TELLING or form != "prose" for stance, form in tags])
    apart = (1 - cosines).clamp_min(0)
    apart = torch.where(
        tells, _WITHIN * apart, apart + _OTHER_SPEAKER * _differ([*rows["speaker"]])
    )
    apart = apart + _NEVER * _differ(tags)
    clustering = cluster.AgglomerativeClustering(
        n_clusters=n_behaviours,
        distance_threshold=distance if n_behaviours is None else None,
        metric="precomputed",
        linkage="average",
    )
    return clustering.fit_predict(apart.numpy()).tolist()


def _differ(values: Sequence[Hashable]) -> Tensor:
    """1 where two of them are not the same."""
    numbers = {value: number for number, value in enumerate(dict.fromkeys(values))}
    codes = torch.tensor([numbers[value] for value in values])
    return (codes[:, None] != codes).double()


def _named_after(members: pd.DataFrame) -> pd.DataFrame:
    """Those of a group that stand for it: of vectors rather than unsteered, greedy if any is."""
    steered = members[members["vector"] >= 0]
    members = members if steered.empty else pd.DataFrame(steered)
    greedy = members[members["sample"] == 0] if "sample" in members else members
    return members if greedy.empty else pd.DataFrame(greedy)


def _groups(
    prompt: str, rows: pd.DataFrame, cosines: Tensor, judge: Judge | None
) -> list[tuple[Any, ...]]:
    """What is told of the groups of one prompt, as in _GROUP_COLUMNS."""
    names, told, groups = [], [], []
    rows = rows.assign(place=range(len(rows)), control=_is_control(rows))
    for number, members in rows[rows["behaviour"] != _INCOHERENT].groupby("behaviour"):
        if not all(members["control"]):
            members = pd.DataFrame(members[~members["control"]])
        texts, places = members["said"].tolist(), members["place"].tolist()
        shown = pd.DataFrame(members if number == _UNSTEERED else _named_after(members))
        nearness = cosines[shown["place"].tolist()][:, places].sum(1)
        # Of two texts each is as near to the other: the first, not whichever rounding lifts.
        medoid = shown.iloc[int(nearness.round(decimals=9).argmax())]
        most = [str(members[tag].mode()[0]) for tag in TAGS]
        name = BASELINE if number == _UNSTEERED else rule_name(most, medoid["said"], prompt)
        names.append(name)
        told.append((prompt, texts))
        steered = members[(members["vector"] >= 0) & ~members["control"]]
        vectors, negatives = (
            sorted({*steered["vector"][sign * steered["scale"] > 0].tolist()}) for sign in (1, -1)
        )
        example = printable(str(medoid["completion"]))
        groups.append([number, "", prompt, len(texts), vectors, negatives, example, *most[:2]])
    if judge is not None:
        names = judged_names(judge, told, names)
    for group, name in zip(groups, unique(names), strict=True):
        group[1] = name
    return [tuple(group) for group in groups]
