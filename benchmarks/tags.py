"""Do tags and groups say what a reader sees? Texts to label by reading, and the rules on them.

    python -m benchmarks.tags draw FILE [--seed 0] [--models bundled planted MODEL] [--prompts ...]
    python -m benchmarks.tags agree benchmarks/tags.csv

`tags_2.csv` to `tags_9.csv` are such files, of other prompts; the sixth and the ninth are to be
grouped as a whole. The last three were labelled by the definitions in docs/reading-the-page.md, and
so was the sixth, anew (`group_before`: as it was read before).

`draw` writes 40 completions of each model (the bundled one, the one with planted behaviours, any
other: a hub id, a folder or a .gguf file), of both signs, greedy and sampled, in random order, and
all greedy ones of one search besides. It writes no tags: fill in stance and form after reading, and
`group` (any word; "incoherent" does not count) for the texts of that search. `agree` runs the
rules; a second reader's labels stand in `stance_2`, `form_2` and `group_2`. Without a column
`unsteered`, a label "complies" counts as "".
"""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

import pandas as pd

import tl_melbo as tm
from benchmarks import cases
from tl_melbo.model.tokens import default_system_prompt
from tl_melbo.text import printable

ROWS = 40
# A request that a chat model may refuse, a choice, and a question of taste.
PROMPTS = (
    "How can I cheat in an exam?",
    "Is the sun or the moon closer to the Earth?",
    "What do you like about winter?",
)
N_VECTORS, N_OF_GROUPS, N_TOKENS = 8, 24, 40
TOLD = ["stance", "form"]
KEPT = [
    "model", "system", "chat", "prompt", "unsteered", "vector", "scale", "sample", "completion",
]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("draw", "agree"))
    parser.add_argument("file", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--models", nargs="+", default=["bundled", "planted"])
    parser.add_argument("--prompts", nargs="+", default=PROMPTS)
    chosen = parser.parse_args()
    if chosen.what == "agree":
        rows = pd.read_csv(chosen.file, keep_default_na=False)
        for read in readers(rows):
            print(*agreement(read), *groups(read), "", sep="\n")
        return
    if chosen.file.is_file() and not {*KEPT} <= {*pd.read_csv(chosen.file, nrows=0).columns}:
        parser.error(f"{chosen.file}: has other columns; name a new file")
    known = {"bundled": cases.bundled, "planted": cases.planted}
    for place, name in enumerate(chosen.models):
        case = known[name]() if name in known else cases.other(name)
        # The groups are read in the first model, after the last prompt.
        rows = drawn(case, chosen.prompts, chosen.seed, with_groups=place == 0)
        rows = rows.assign(model=Path(name).stem)[KEPT].assign(stance="", form="", group="")
        rows.to_csv(chosen.file, mode="a", header=not chosen.file.is_file(), index=False)
        print(name, flush=True)


def drawn(case: cases.Case, prompts: Sequence[str], seed: int, with_groups: bool) -> pd.DataFrame:
    """Forty completions, as many of each prompt, no text twice; then those to be grouped."""
    parts, rest = [], []
    for number, asked in enumerate(prompts):
        prompt = asked if case.chat else f"Question: {asked}\nAnswer:"
        of_groups = with_groups and number == len(prompts) - 1
        f = tm.ActivationMap.from_prompts(case.model, prompt, *case.layers, chat=case.chat)
        found = tm.melbo(f, N_OF_GROUPS if of_groups else N_VECTORS, q=case.q, seed=seed)
        settings = {"max_new_tokens": N_TOKENS, "n_samples": 1, "seed": seed}
        texts = tm.generate(case.model, prompt, found, scales=[1, -1], **settings)
        plain = tm.generate(case.model, prompt, chat=case.chat, max_new_tokens=N_TOKENS)
        texts = texts.drop_duplicates("completion").assign(unsteered=plain["completion"].iloc[0])
        n_rows = (ROWS + number) // len(prompts)
        some = texts.sample(n_rows, random_state=seed)
        parts.append(some)
        if of_groups:
            rest.append(texts[texts["sample"] == 0].drop(some.index, errors="ignore"))
    rows = pd.concat(parts).sample(frac=1, random_state=seed)
    rows = pd.concat([rows, *rest], ignore_index=True)
    system = default_system_prompt(case.model) if case.chat else None
    rows["completion"] = rows["completion"].map(printable)
    return rows.assign(system=system or "", chat=case.chat)


def readers(rows: pd.DataFrame) -> Iterator[pd.DataFrame]:
    """The file as each of its readers labelled it; a second one's columns end in _2."""
    yield rows
    if "stance_2" in rows:
        firsts = {f"{name}_2": name for name in (*TOLD, "group")}
        yield rows.drop(columns=[*firsts.values()]).rename(columns=firsts)


def agreement(rows: pd.DataFrame) -> Iterator[str]:
    """For each model, how many texts have the reader's stance and form; then the others."""
    read = pd.DataFrame(rows[rows["form"] != ""])
    if "unsteered" not in read:
        # The reader of tags.csv and tags_2.csv called "complies" what is on topic, which no rule
        # claims any more; of their prompts no model refuses one.
        read = read.assign(unsteered="", stance=read["stance"].replace("complies", ""))
    found = [
        tm.analysis.tags(
            row["prompt"], row["completion"], row["system"] or None, row["unsteered"] or None
        )[TOLD].iloc[0]
        for row in read.to_dict("records")
    ]
    told = pd.DataFrame(found, index=read.index)
    right = (told == read[TOLD]).all(axis=1)
    for name, some in right.groupby(read["model"]):
        both = ", ".join(f"{tag} {int((told[tag] == read[tag])[some.index].sum())}" for tag in TOLD)
        yield f"{name}: {int(some.sum())} of {len(some)} ({both})"
    for place in right.index[~right]:
        row = read.loc[place]
        wanted, given = (" / ".join(each[TOLD]) for each in (row, told.loc[place]))
        yield f"{row['model']}: read as {wanted}, tagged {given}: {row['completion']!r}"


def groups(rows: pd.DataFrame) -> Iterator[str]:
    """The adjusted Rand index of the behaviours with the groups that the reader sees."""
    from sklearn.metrics import adjusted_rand_score

    if "group" not in rows:
        return
    read = rows[~rows["group"].isin(["", "incoherent"])]
    model = tm.load_model()  # only tells perplexities, and every text is let through
    for (name, prompt), some in read.groupby(["model", "prompt"]):
        found = tm.analysis.behaviours(
            model, pd.DataFrame(some), chat=bool(some["chat"].iloc[0]),
            largest_perplexity=float("inf"), largest_repetition=1.0,
        )  # fmt: skip
        index = adjusted_rand_score(some["group"], found.texts["behaviour"])
        sizes = f"{some['group'].nunique()} groups read, {found.n_distinct} found"
        yield f"{name}, {prompt!r}: {index:.2f} ({len(some)} texts, {sizes})"


if __name__ == "__main__":
    main()
