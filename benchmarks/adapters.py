"""Is what divergence adapters do one direction? Eight of the bundled model, and two judges.

    python -m benchmarks.adapters [--adapters 8] [--table]

Adapters are kept in runs/adapters, each as it is trained, and so is what the judges said of each.
The same command goes on where it was. It writes benchmarks/adapters.csv, and texts side by side
into benchmarks/adapters.md.
"""

import argparse
import json
import re
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

import tl_melbo as tm
from benchmarks.tables import markdown
from tl_melbo import files
from tl_melbo.analysis import behaviours, embeddings
from tl_melbo.text import printable

CSV, TEXTS = Path(__file__).with_suffix(".csv"), Path(__file__).with_suffix(".md")
FOLDER = Path("runs/adapters")
TRAINING = {"steps": 10, "batch_size": 12, "max_new_tokens": 24}
N_TOKENS, N_BATCHES = 24, 6
JUDGES = ("rules", "local")
FROM_TRAINING = ("kl", "nll", "entropy", "entropy_without", "repetition", "collapsed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--adapters", default=8, type=int, metavar="N", help="how many (8)")
    parser.add_argument("--table", action="store_true", help="only from what is kept")
    chosen = parser.parse_args()
    run = tm.Run(FOLDER)
    paths = [run.folder / f"judged-{number}.json" for number in range(chosen.adapters)]
    if not chosen.table:
        model = tm.load_model()
        adapters = trained(run, model, chosen.adapters)
        missing = [number for number, path in enumerate(paths) if not path.is_file()]
        if missing:
            for number, known in zip(missing, described(model, adapters[missing]), strict=True):
                keep(paths[number], known)
            told("the texts and the judge by rules")
        for path in paths:
            judged(model, path)
    adapters = tm.Adapter.load(run.folder / "adapters.safetensors")[: chosen.adapters]
    known = [json.loads(path.read_text(encoding="utf-8")) for path in paths if path.is_file()]
    frame = rows(adapters[: len(known)], known)
    frame.to_csv(CSV, index=False)
    with files.replacing(TEXTS) as path:
        path.write_text(side_by_side(known), encoding="utf-8")
    print(markdown(frame))


def trained(run: tm.Run, model: Any, n_adapters: int) -> tm.Adapter:
    """The adapters, with the CPU seconds of each step on the screen."""
    began = time.process_time()

    def tell(number: int, step: int, measured: Any) -> None:
        seconds = time.process_time() - began
        print(
            f"adapter {number}, step {step}: KL {measured.kl:.2f}, {seconds:.0f} CPU s", flush=True
        )

    return run.adapters(model, n_adapters, on_step=tell, **TRAINING)


def judged(model: Any, path: Path) -> None:
    """Ask the local judge what the judge by rules was asked, and keep that in the same file."""
    known = json.loads(path.read_text(encoding="utf-8"))
    if "local" not in known:
        judge = tm.judges.local(model, max_new_tokens=40)
        answers = [judge(question).strip() for question in known["questions"]]
        keep(path, known | {"local": [answer or "No answer." for answer in answers]})
        told(f"{path.stem} by the local model")


def described(model: Any, adapters: tm.Adapter) -> list[dict[str, Any]]:
    """Of each: the texts of both sides, what the judge by rules says, and what it was asked."""
    held_out = tm.adapters.situations().query("split == 'held_out'")
    place = held_out.groupby("situation").cumcount()
    # Vectors are taken from other prompts than those on which they are judged.
    for_vectors = held_out["prompt"][place == 0].tolist()[::2]
    for_texts = held_out["prompt"][place == 2].tolist()
    options: dict[str, Any] = {"max_new_tokens": N_TOKENS, "positions": slice(1, None)}
    vectors = adapters.vectors(model, for_vectors, "addition", **options)
    asked: list[str] = []

    def judge(question: str) -> str:
        asked.append(question)
        return by_rules(question)

    options = {"n_batches": N_BATCHES, "max_new_tokens": N_TOKENS}
    scores = tm.evaluation.linearities(model, adapters, vectors, for_texts, judge=judge, **options)
    return [
        {
            "constant_share": float(share.mean()),
            "texts": found.texts.to_dict("records"),
            "questions": asked[2 * N_BATCHES * number :][: 2 * N_BATCHES],
            "rules": [*found.of_adapter, *found.of_vectors],
            **coherence(model, found.texts),
        }
        for number, (found, share) in enumerate(
            zip(scores, vectors.columns["constant_share"], strict=True)
        )
    ]


def coherence(model: Any, texts: pd.DataFrame) -> dict[str, float]:
    """Shares of the texts that are coherent, and that are in one group with the unsteered one."""
    sides = {"unsteered": -1, "adapter": 0, "vectors": 1}
    parts = [
        pd.DataFrame({"vector": number, "prompt": texts["prompt"], "completion": texts[side]})
        for side, number in sides.items()
    ]
    grouped = behaviours(model, pd.concat(parts, ignore_index=True), chat=False).texts
    shares = {}
    for side, number in sides.items():
        some = grouped[grouped["vector"] == number]
        shares[f"coherent_{side}"] = float(some["coherent"].mean())
        shares[f"baseline_{side}"] = float((some["behaviour"] == 0).mean())
    return shares


def told(what: str) -> None:
    print(f"{what}: done, {time.process_time():.0f} CPU s since the start", flush=True)


def keep(path: Path, known: dict[str, Any]) -> None:
    with files.replacing(path) as new:
        new.write_text(json.dumps(known, indent=1), encoding="utf-8")


# A judge that needs no model: it counts, and says in a sentence what has changed.

_PAIR = r"first text:\n(.*?)\nPair \d+, second text:\n(.*?)(?=\n\nPair \d|\n\nIn one sentence)"
_FIRST_PERSON = {"i", "me", "my", "mine", "we", "us", "our", "i'm"}
_SECOND_PERSON = {"you", "your", "yours"}
_N_NEW_WORDS, _MANY = 6, 1 / 3


def by_rules(question: str) -> str:
    """How the second texts of a question differ from the first, by counts."""
    pairs = re.findall(_PAIR, question, re.DOTALL)
    firsts, seconds = ([pair[side] for pair in pairs] for side in (0, 1))
    said = [
        f"{verb} {'more' if change > 0 else 'less'}"
        for verb, least, count in _COUNTS
        if abs(change := _mean(count, seconds) - _mean(count, firsts)) > least
    ]
    before, after = (
        Counter(word for text in some for word in {*words(text)}) for some in (firsts, seconds)
    )
    new = [word for word, n in after.items() if n >= max(2, before[word] + 2) and len(word) > 2]
    new.sort(key=lambda word: before[word] - after[word])
    if new:
        said.append(f"use the words {', '.join(new[:_N_NEW_WORDS])}")
    (opening, n), *_ = Counter(_opening(text) for text in seconds).most_common(1)
    if n > max(1, _MANY * len(seconds), [_opening(text) for text in firsts].count(opening)):
        said.append(f"begin with {opening or 'no word'}")
    return f"They {', '.join(said)}." if said else "They do not differ."


def _opening(text: str) -> str:
    return next(iter(words(text)), "")


def words(text: str) -> list[str]:
    """The words of a text, in lower case."""
    return re.findall(r"[^\W\d_]+(?:'[^\W\d_]+)?", text.lower().replace("’", "'"))


def _mean(count: Callable[[str], float], texts: Sequence[str]) -> float:
    return sum(map(count, texts)) / len(texts)


def _share(text: str, of: set[str]) -> float:
    found = words(text)
    return sum(word in of for word in found) / max(1, len(found))


# What is said, the least change of the mean over texts that is told, and the count.
_COUNTS: tuple[tuple[str, float, Callable[[str], float]], ...] = (
    ("write", 4.0, lambda text: len(words(text))),
    ("ask questions", 0.25, lambda text: text.count("?")),
    ("exclaim", 0.25, lambda text: text.count("!")),
    ("quote speech", 0.4, lambda text: len(re.findall(r"[\"“”]", text))),
    ("break lines", 0.5, lambda text: text.count("\n")),
    ("use figures", 1.0, lambda text: len(re.findall(r"\d", text))),
    ("speak of themselves", 0.04, lambda text: _share(text, _FIRST_PERSON)),
    ("address the reader", 0.04, lambda text: _share(text, _SECOND_PERSON)),
    ("repeat words", 0.1, lambda text: 1 - len({*words(text)}) / max(1, len(words(text)))),
)


def rows(adapters: tm.Adapter, known: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """One row an adapter: its training, its texts' coherence, its scores beside their nulls."""
    columns = {"adapter": range(len(known))}
    columns |= {name: adapters.columns[name].tolist() for name in FROM_TRAINING}
    names = ("coherent_unsteered", "coherent_adapter", "coherent_vectors", "baseline_adapter")
    for name in (*names, "constant_share"):
        columns[name] = [each[name] for each in known]
    for judge in JUDGES:
        if len(known) < 2 or not all(judge in each for each in known):
            continue
        sides = [(each[judge][:N_BATCHES], each[judge][N_BATCHES:]) for each in known]
        scores = [tm.evaluation.linearity_score(*side) for side in sides]
        null = tm.evaluation.linearity_null(*map(list, zip(*sides, strict=True)))
        columns[f"{judge}_score"] = null["score"].tolist()
        columns[f"{judge}_low"] = [score.low for score in scores]
        columns[f"{judge}_high"] = [score.high for score in scores]
        for name in ("null_mean", "null_low", "null_high", "p_value"):
            columns[f"{judge}_{name}"] = null[name].tolist()
    return pd.DataFrame(columns).round(3)


_HEADER = """# What adapters and their vectors write

Made by `python -m benchmarks.adapters`. Greedy, {tokens} tokens, ⏎ for a line break. Of each
adapter's {prompts} held-out prompts, the three are those whose two texts (adapter, vectors) have
the highest, the median and the lowest cosine of their sentence embeddings."""


def side_by_side(known: Sequence[dict[str, Any]]) -> str:
    """Three prompts of each adapter: where both sides are most alike, in between, and least."""
    parts = [_HEADER.format(tokens=N_TOKENS, prompts=len(known[0]["texts"]))]
    for number, each in enumerate(known):
        texts = pd.DataFrame(each["texts"])
        a, b = (embeddings(texts[side].tolist(), "sentences") for side in ("adapter", "vectors"))
        cosine = (a * b).sum(-1)
        order = cosine.argsort(descending=True).tolist()
        lines = [
            {"cosine": f"{cosine[place]:.2f}", **{side: cell(texts[side][place]) for side in texts}}
            for place in (order[0], order[len(order) // 2], order[-1])
        ]
        table = pd.DataFrame(lines)[["cosine", "prompt", "unsteered", "adapter", "vectors"]]
        said = [
            f"* {judge}, of {side}: {cell(each[judge][place])}"
            for judge in JUDGES
            if judge in each
            for side, place in (("the adapter", 0), ("its vectors", N_BATCHES))
        ]
        told = "\n".join(said)
        parts.append(f"## Adapter {number}\n\n{markdown(table)}\n\nOne description each:\n\n{told}")
    return "\n\n".join(parts) + "\n"


def cell(text: str) -> str:
    """A text for a cell of a Markdown table."""
    text = printable(text.strip().replace("\n", " ⏎ "))
    return re.sub(r"([\\|`*_\[\]<>#])", r"\\\1", text)


if __name__ == "__main__":
    main()
