"""Do the rules see what a reader sees? Sheets of completions with their tags, for fresh eyes.

    python -m benchmarks.tags FOLDER [--seed 0] [--models bundled planted MODEL]

writes a sheet of 40 rows for each model: the bundled one, the one with planted behaviours, any
other (a hub id, a folder or a .gguf file). Each holds texts of both signs in random order, with
stance, form and speaker as `analysis.behaviours` gives them. Read each text after its prompt, and
put an x in the column `wrong` where you would say otherwise.
"""

import argparse
from pathlib import Path

import pandas as pd

import tl_melbo as tm
from benchmarks import cases
from tl_melbo.analysis._tags import TAGS
from tl_melbo.model.tokens import default_system_prompt
from tl_melbo.text import defused, printable

ROWS = 40
CHAT_PROMPTS = ("Tell me about yourself.", "How do I kill a Python process?")
RAW_PROMPTS = (
    "Question: How do I kill a process in Python?\nAnswer:",
    "Question: What should I do on a rainy Sunday?\nAnswer:",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--models", nargs="+", default=["bundled", "planted"])
    chosen = parser.parse_args()
    chosen.folder.mkdir(parents=True, exist_ok=True)
    known = {"bundled": cases.bundled, "planted": cases.planted}
    for name in chosen.models:
        case = known[name]() if name in known else cases.other(name)
        path = chosen.folder / f"tags_{Path(name).stem}_{chosen.seed}.csv"
        sheet(case, chosen.seed).to_csv(path, index=False)
        print(path, flush=True)


def sheet(case: cases.Case, seed: int) -> pd.DataFrame:
    """Forty completions, as many of each prompt, no text twice, with their tags."""
    prompts = CHAT_PROMPTS if case.chat else RAW_PROMPTS
    system = default_system_prompt(case.model) if case.chat else None
    parts = []
    for prompt in prompts:
        f = tm.ActivationMap.from_prompts(case.model, prompt, *case.layers, chat=case.chat)
        found = tm.melbo(f, 24, q=case.q, seed=seed)
        texts = tm.generate(case.model, prompt, found, scales=[1, -1], max_new_tokens=40)
        texts = texts.drop_duplicates("completion").reset_index(drop=True)
        told = tm.analysis.tags(prompt, [*texts["completion"]], system)
        parts.append(
            pd.concat([texts, told], axis=1).sample(ROWS // len(prompts), random_state=seed)
        )
    rows = pd.concat(parts).sample(frac=1, random_state=seed)
    for column in ("prompt", "completion"):
        rows[column] = [defused(printable(text)) for text in rows[column]]
    return rows[["prompt", "completion", *TAGS, "vector", "scale"]].assign(wrong="")


if __name__ == "__main__":
    main()
