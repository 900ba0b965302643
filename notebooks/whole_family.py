"""The whole MELBO-ortho family of two vectors, and the published optimiser beside ours.

    make results
    python -m notebooks.whole_family --texts    # the texts of random vectors alone, from the tables

takes what `tl-melbo discover` and `tl-melbo ortho --all` left in runs/whole, adds the comparisons
that the command does not make, and writes figures and tables to notebooks/results. What takes long
is kept in runs/whole, so that an interrupted call goes on where it was.
"""

import argparse
from collections.abc import Iterable
from pathlib import Path

import pandas as pd
import torch

import tl_melbo as tm
from tl_melbo import runs
from tl_melbo.analysis._similarity import random_like

PROMPT = "Tell me about yourself."
# A person of 25, who is a software engineer; a philosopher who speaks of no self at all.
FAMILIES = (4, 20)
# Those two optimisers are compared on: the person, a superhero, a film.
COMPARED = (4, 5, 6)
N_COMPARED = 5
PENALTIES = (0.0, 0.001, 0.003, 0.01, 0.03)
SCALES = (-0.5, 0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
OTHER_PROMPTS = (
    "What did you do last weekend?",
    "Where did you grow up?",
    "Write a short poem about the sea.",
    "How do I boil an egg?",
)
# People who tell about themselves, as under vector 4, and texts in which nobody does.
PERSONAL = (
    "I'm a 31-year-old nurse from Leeds. I've been working nights for six years now, and I love "
    "hiking with my two dogs whenever I get a weekend off.",
    "My name is Marta, I'm 42 and I run a small bakery with my sister. We've always dreamed of "
    "opening a second shop near the harbour.",
    "I grew up in a village in the mountains. I studied law for two years, then I left it all to "
    "become a carpenter, and I've never been happier.",
    "I'm a third-year student of physics. I play the cello in the university orchestra and I've "
    "recently started to learn Portuguese.",
    "I've been a software developer for eleven years. I live in Lisbon with my husband and our "
    "daughter, and I spend my evenings restoring old radios.",
    "I'm 27, I drive a tram, and I write short stories that nobody has read yet. My friends say "
    "that I'm a good listener.",
)
IMPERSONAL = (
    "The river rises in the northern hills and flows past three towns before it reaches the sea. "
    "Its lower course was straightened in the nineteenth century.",
    "Copper conducts heat and electricity well. It is drawn into wire, rolled into sheets, and "
    "mixed with zinc to make brass.",
    "To change the filter, switch the machine off, open the cover at the back, and pull the "
    "cartridge out. Rinse the new one before it is inserted.",
    "The treaty was signed after eleven months of talks. It set the border along the ridge, and "
    "left the question of the harbour to a later conference.",
    "A sorting algorithm is stable if equal elements keep their order. Merge sort is stable; the "
    "usual versions of quicksort are not.",
    "The museum is open every day except Monday. Tickets are sold at the entrance, and groups of "
    "more than ten pay a reduced price.",
)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--run", type=Path, default=Path("runs/whole"))
    arguments.add_argument("--out", type=Path, default=Path("notebooks/results"))
    arguments.add_argument("--texts", action="store_true", help="write random vectors' texts only")
    given = arguments.parse_args()
    run, out = given.run, given.out
    if given.texts:
        control(out)
        return
    out.mkdir(parents=True, exist_ok=True)
    found = tm.Run(run).found
    families = {part.number: part for part in tm.Run(run).families()}
    missing = [number for number in FAMILIES if number not in families]
    if missing:
        raise SystemExit(
            f"{run} lacks the families of vectors {missing}: run `tl-melbo ortho {run} --vector "
            f"{missing[0]} --all` first, or `make results`, which does all of it"
        )
    model = tm.load_model()
    f = tm.ActivationMap.from_prompts(model, PROMPT, chat=True)
    for number in FAMILIES:
        print(f"figures of family {number}")
        draw(families[number], f, out)
        table = families[number].table.drop(columns="stopped", errors="ignore")
        table = with_random_texts(model, f, table)
        runs.save_table(out / f"family_{number}.csv", rounded(table))
        composed = families[number].composition
        runs.save_table(out / f"composition_{number}.csv", rounded(composed))
    print("the two optimisers")
    optimisers = compared(f, found, run)
    rounded(optimisers).to_csv(out / "optimisers.csv", index=False)
    worse = optimisers[
        (optimisers["quasi-newton distance"] > optimisers["adam distance"])
        | (optimisers["quasi-newton evaluations"] > optimisers["adam evaluations"] / 8)
    ]
    if len(worse):
        raise SystemExit(f"ours is not as near, or not in an eighth of the gradients:\n{worse}")
    print("norm penalties")
    rounded(penalised(model, f, found[FAMILIES[0]])).to_csv(out / "penalties.csv", index=False)
    print("presence")
    for number in FAMILIES:
        scanned = presence(model, families[number])
        rounded(scanned).to_csv(out / f"presence_{number}.csv", index=False)
        save(tm.plots.presence_points(scanned, title=""), out / f"presence_{number}")
    print("scales and other prompts")
    part = families[FAMILIES[0]]
    some = tm.SteeringVectors(
        torch.cat([part.reference.vectors, part.vectors.vectors[:4]]), dict(found.story)
    )
    swept = tm.analysis.scale_sweep(model, PROMPT, some, SCALES, max_new_tokens=30)
    runs.save_table(out / f"scales_{part.number}.csv", rounded(swept))
    save(tm.plots.scale_curves(swept, title=""), out / f"scales_{part.number}")
    transferred = tm.analysis.transfer(model, some, OTHER_PROMPTS, max_new_tokens=30)
    runs.save_table(out / f"transfer_{part.number}.csv", rounded(transferred))


def control(out: Path) -> None:
    """Write the texts of random vectors into the families' tables that are kept."""
    model = tm.load_model()
    f = tm.ActivationMap.from_prompts(model, PROMPT, chat=True)
    for number in FAMILIES:
        path = out / f"family_{number}.csv"
        table = runs.load_table(path, ("kind", "index", "norm", "completion"))
        runs.save_table(path, with_random_texts(model, f, table))


def with_random_texts(model: object, f: tm.ActivationMap, table: pd.DataFrame) -> pd.DataFrame:
    """A family's table with texts in its rows of random vectors, which the command leaves empty.

    Each random vector has the norm of the member with its number, so the two texts compare.
    """
    rows = table["kind"] == "random"
    theta = torch.zeros(int(rows.sum()), f.d_model)
    theta[:, 0] = torch.tensor(table.loc[rows, "norm"].to_numpy())
    # The same vectors as in the table: their directions are drawn from a seed alone.
    random, layer = random_like(theta, seed=0), f.source_layer
    kl = tm.analysis.kl_divergence(model, PROMPT, random, layer=layer, chat=True)
    kept = torch.tensor(table.loc[rows, "kl_to_unsteered"].to_numpy())
    if (off := float((kl - kept).abs().max())) > 0.02:
        raise SystemExit(f"other random vectors than the table's: their KL is up to {off:.2g} off")
    texts = tm.generate(model, PROMPT, random, layer, chat=True)["completion"]
    completions = table["completion"].copy()
    completions[rows] = texts.to_numpy()
    return table.assign(completion=completions)


def draw(part: tm.report.Family, f: tm.ActivationMap, out: Path) -> None:
    """The curves and heatmaps of one family."""
    rows = dict(iter(part.table.groupby("kind")))
    kl = {kind: torch.tensor(group["kl_to_reference"].to_numpy()) for kind, group in rows.items()}
    baselines = {
        "no vector": kl["unsteered"],
        "random vectors of the same norms": kl["random"],
        "the family at theta0's norm": kl["rescaled"],
    }
    unsteered = float(rows["unsteered"]["distance"].iloc[0])
    number = part.number
    save(tm.plots.kl_curve(kl["family"], part.vectors, baselines=baselines, title=""),
         out / f"kl_{number}")  # fmt: skip
    save(tm.plots.norm_curve(part.vectors, title=""), out / f"norm_{number}")
    save(tm.plots.distance_curve(part.vectors, unsteered, title=""), out / f"distance_{number}")
    save(tm.plots.composition_curves(part.composition, title=""), out / f"composition_{number}")
    with torch.no_grad():
        theta = torch.cat([part.reference.vectors, part.vectors.vectors])
        # Without the first token, whose residual is far longer than the others'.
        effects = f.delta(theta)[:, :, 1:]
    similarity = tm.analysis.cosine_similarity(effects)
    save(tm.plots.cosine_heatmap(similarity, ""), out / f"effects_{number}")


def compared(f: tm.ActivationMap, found: tm.SteeringVectors, run: Path) -> pd.DataFrame:
    """The first vectors of each theta0's family, by the published optimiser and by ours."""
    frames = []
    for number in COMPARED:
        columns = {"theta0": number}
        for name in ("adam", "quasi-newton"):
            kept = run / f"{name}-{number}.safetensors"
            family = tm.SteeringVectors.load(kept) if kept.exists() else None
            # Of an earlier run's vector of that number: begin anew.
            if family is not None and not grew_from(family, found[number]):
                family = None
            while family is None or len(family) < N_COMPARED:
                more = tm.melbo_ortho(f, found[number], 1, previous=family, optimiser=name)
                family = more if family is None else tm.join_family([family, more])
                family.save(kept)
            table = family.table()[:N_COMPARED]
            columns["vector"] = table["index"]
            columns |= {f"{name} {column}": table[column]
                        for column in ("distance", "norm", "evaluations")}  # fmt: skip
        frames.append(pd.DataFrame(columns))
    return pd.concat(frames, ignore_index=True)


def grew_from(family: tm.SteeringVectors, theta0: tm.SteeringVectors) -> bool:
    """Whether a family is at right angles to this vector, and says that it was made from it."""
    source = (family.story["theta0"] or {}).get("story") or {}
    same = source.get("date") == theta0.story.get("date")
    return same and float(tm.analysis.cosine_similarity(family, theta0).abs().max()) < 1e-5


def penalised(model: object, f: tm.ActivationMap, theta0: tm.SteeringVectors) -> pd.DataFrame:
    """The author's open question: are there such vectors of the original's size?"""
    frames = []
    for penalty in PENALTIES:
        family = tm.melbo_ortho(f, theta0, 3, penalty)
        kl = tm.analysis.kl_divergence(model, PROMPT, family, theta0)
        texts = tm.generate(model, PROMPT, family, max_new_tokens=30)["completion"]
        frames.append(
            family.table()[["index", "norm", "distance"]].assign(
                norm_penalty=penalty, kl_to_theta0=kl.numpy(), completion=texts
            )
        )
    return pd.concat(frames, ignore_index=True)


def presence(model: object, part: tm.report.Family) -> pd.DataFrame:
    """Theta0 (index -1) and its family in texts of people about themselves, against others."""
    vectors = torch.cat([part.reference.vectors, part.vectors.vectors])
    library = tm.SteeringVectors(
        vectors,
        dict(part.vectors.story),
        {"index": torch.arange(len(vectors)) - 1},
    )
    return tm.analysis.presence(model, library, PERSONAL, IMPERSONAL)


def rounded(table: pd.DataFrame) -> pd.DataFrame:
    """Numbers to five digits: what is below differs between machines."""
    numeric = table.select_dtypes("floating").columns
    return table.assign(**{name: significant(table[name]) for name in numeric})


def significant(values: Iterable[float]) -> list[float]:
    return [float(f"{value:.5g}") for value in values]


def save(figure: object, path: Path) -> None:
    """As a picture: small, and to be read wherever the repository is."""
    figure.update_layout(margin={"t": 24})
    figure.write_image(path.with_suffix(".png"), scale=1)


if __name__ == "__main__":
    main()
