"""What the demo's vectors bring out, counted on samples: for the README.

    python -m benchmarks.gallery          # some minutes: writes benchmarks/gallery.json
    python -m benchmarks.quoted           # puts it into the README

The vectors and what to count were chosen by reading greedy texts. The rates are of samples, which
had no part in that, beside as many of the unsteered model and of random vectors of the same norm.
"""

import functools
import json
import re
from pathlib import Path

import pandas as pd

import tl_melbo as tm

PROMPT = "Tell me about yourself."
PATH = Path(__file__).with_name("gallery.json")
N_FIRST, N_SAMPLES, N_RANDOM = 6, 32, 16
# By vector: what a reader would call it, and what is counted.
CHOSEN = {
    4: ("a person of some age", r"year-old"),
    1: ("repeats its system prompt", r"named SmolLM, trained by Hugging Face"),
    5: ("a superhero", r"super ?(hero|power)"),
    20: ("a philosopher", r"philosoph|profound"),
}
AS_AI = r"\bAI\b|language model|chatbot"


def main() -> None:
    model = tm.load_model()
    f = tm.ActivationMap.from_prompts(model, PROMPT, 8, 16, chat=True)
    library = tm.melbo(f, n_vectors=32, radius=12.0)
    found = library[list(CHOSEN)]
    options = {"max_new_tokens": 40, "chat": True}
    greedy = tm.generate(model, PROMPT, found, **options)["completion"].tolist()
    first = tm.generate(model, PROMPT, library[:N_FIRST], **options)["completion"].tolist()
    baseline = tm.generate(model, PROMPT, **options)["completion"].item()
    options |= {"temperature": 0.7, "seed": 1, "n_samples": N_SAMPLES}
    sampled = [tm.generate(model, PROMPT, vectors, **options) for vectors in (None, found)]
    random = tm.random_vectors(f, N_RANDOM, radius=12.0, seed=1)
    options["n_samples"] = N_SAMPLES // N_RANDOM
    by_chance = tm.generate(model, PROMPT, random, **options)

    def counted(pattern: str, place: int) -> dict[str, list[float]]:
        """Texts that have it, all texts, and Wilson's interval."""
        has = functools.partial(re.search, pattern, flags=re.IGNORECASE)
        table = tm.analysis.rates(pd.concat(sampled), has, random=by_chance)
        table = table[table["vector"].isna() | table["vector"].isin([-1, place])]
        return {
            row.steering: [row.hits, row.n, round(row.low, 4), round(row.high, 4)]
            for row in table.itertuples()
        }

    rows = [
        {
            "vector": vector,
            "name": name,
            "counted": pattern,
            "greedy": greedy[place],
            "rates": counted(pattern, place),
            "speaks as an AI": counted(AS_AI, place),
        }
        for place, (vector, (name, pattern)) in enumerate(CHOSEN.items())
    ]
    told = {"baseline": baseline, "first": first, "rows": rows}
    PATH.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    print(PATH.read_text())


if __name__ == "__main__":
    main()
