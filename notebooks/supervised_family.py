"""Do supervised vectors have fewer orthogonal followers? Families of four kinds of theta0.

    python -m notebooks.supervised_family [--followers 100]

An open question under the post on MELBO-ortho, which also asks whether the sum of the followers
approaches theta0. Here theta0 is found by MELBO, made from labels by contrast (twice), or random;
all have one norm and one prompt. Families are kept in runs/supervised, so that an interrupted call
goes on; writes notebooks/results/supervised.csv, supervised_sums.csv and supervised.png.
"""

import argparse
from pathlib import Path
from typing import Any

import pandas as pd
import torch

import tl_melbo as tm
from notebooks.whole_family import IMPERSONAL, PERSONAL, PROMPT, rounded, save

OUT, KEPT = Path("notebooks/results"), Path("runs/supervised")
RADIUS, PERSON = 12.0, 4
QUESTIONS = (
    "Tell me about yourself.",
    "What is the tallest mountain in Africa?",
    "Give me advice for a job interview.",
    "How do I boil an egg?",
    "What did you do last weekend?",
    "Explain to a child why the sky is blue.",
)
SUMS = (2, 3, 10, 20, 50, 100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--followers", default=100, type=int, help="of each theta0 (100)")
    n_followers = parser.parse_args().followers
    model = tm.load_model()
    f = tm.ActivationMap.from_prompts(model, PROMPT, chat=True)
    tables, sums = [], []
    for name, theta0 in starts(model, f).items():
        # Without what tells of other prompts: the family is searched on this one.
        theta0 = tm.SteeringVectors.from_tensor(theta0.vectors, source_layer=f.source_layer)
        family = tm.Run(KEPT / name).keep(tm.melbo_ortho, f, n_followers, theta0=theta0)
        sizes = [size for size in SUMS if size <= len(family)]
        table = tm.analysis.family(model, f, family, theta0, max_new_tokens=30)
        tables.append(table.assign(theta0=name))
        composed = tm.analysis.composition(
            model, f, family, theta0, sizes, n_random_subsets=0, max_new_tokens=30
        )
        composed["cosine"] = cosines(f, family, theta0, composed["size"])
        sums.append(composed.assign(theta0=name))
        print(summary(tables[-1]), flush=True)
        rounded(pd.concat(tables)).to_csv(OUT / "supervised.csv", index=False)
        rounded(pd.concat(sums)).to_csv(OUT / "supervised_sums.csv", index=False)
    save(picture(pd.concat(tables)), OUT / "supervised")


def starts(model: Any, f: tm.ActivationMap) -> dict[str, tm.SteeringVectors]:
    """Theta0 of each kind, all of one norm."""
    texts = tm.ActivationMap.from_prompts(model, PERSONAL)
    others = tm.ActivationMap.from_prompts(model, IMPERSONAL)
    pirate = tm.ActivationMap.from_prompts(
        model, [f"Answer as a pirate would. {question}" for question in QUESTIONS], chat=True
    )
    plain = tm.ActivationMap.from_prompts(model, list(QUESTIONS), chat=True)
    return {
        "melbo": tm.melbo(f, PERSON + 1, RADIUS)[PERSON],
        "contrast-person": tm.contrastive(texts, others, radius=RADIUS, positions=slice(None)),
        "contrast-pirate": tm.contrastive(pirate, plain, radius=RADIUS),
        "random": tm.random_vectors(f, 1, RADIUS),
    }


def cosines(
    f: tm.ActivationMap, family: tm.SteeringVectors, theta0: tm.SteeringVectors, sizes: Any
) -> list[float]:
    """Of the effects of the first k followers' sum and of theta0: do they point the same way?"""
    known = {}
    for size in sizes.unique():
        total = family.vectors[:size].sum(0, keepdim=True)
        with torch.no_grad():
            both = f.delta(torch.cat([total, theta0.vectors])).mean(2).flatten(1)
        known[size] = float(torch.cosine_similarity(both[:1], both[1:]))
    return [known[size] for size in sizes]


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """Norm, KL from theta0 and distance, ten followers at a time."""
    family = table[table["kind"] == "family"]
    columns = ["norm", "distance", "kl_to_reference", "kl_to_unsteered"]
    by_ten = family.groupby(family["index"] // 10)[columns].mean()
    others = table[table["kind"] != "family"].groupby("kind")[columns].mean()
    return pd.concat([by_ten, others])


def picture(table: pd.DataFrame) -> Any:
    """How far each follower is from theta0's effect, as a share of the unsteered model's."""
    from plotly import graph_objects as go

    figure = go.Figure()
    for name, some in table.groupby("theta0", sort=False):
        unsteered = float(some[some["kind"] == "unsteered"]["distance"].iloc[0])
        family = some[some["kind"] == "family"]
        figure.add_scatter(
            x=family["index"], y=family["distance"] / unsteered, mode="lines", name=str(name)
        )
    figure.update_xaxes(title_text="follower")
    figure.update_yaxes(title_text="distance from theta0's effect / unsteered")
    figure.update_layout(template="plotly_white", width=820, height=460)
    return figure


if __name__ == "__main__":
    main()
