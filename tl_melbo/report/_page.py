"""What the page shows of a library and its families: given, or computed by the analyses."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from tl_melbo import checks
from tl_melbo.activation_map import ActivationMap
from tl_melbo.adapters import Adapter
from tl_melbo.analysis import Behaviours, behaviours, cosine_similarity
from tl_melbo.analysis._completions import COMPLETION_COLUMNS, collect_completions
from tl_melbo.analysis._family import Family
from tl_melbo.analysis._random_baseline import random_baseline
from tl_melbo.analysis._side_effects import COLUMNS
from tl_melbo.files import replacing
from tl_melbo.gated import GatedFactors
from tl_melbo.generation import OnBatch, Tell, in_parts
from tl_melbo.judges._asking import Judge, check_optional_judge
from tl_melbo.model.bridge import Model
from tl_melbo.model.tokens import as_seen
from tl_melbo.report import _data, _facts, _parts
from tl_melbo.report._data import Measured
from tl_melbo.report._notes import Notes, notes_given
from tl_melbo.report._render import render
from tl_melbo.shapes import shape_checked
from tl_melbo.steering import as_chat
from tl_melbo.tables import Table
from tl_melbo.text import printable, quoted
from tl_melbo.vectors import SteeringVectors


@shape_checked
def write(
    path: str | Path,
    model: Model,
    found: SteeringVectors,
    *,
    completions: pd.DataFrame | None = None,
    activation_map: ActivationMap | None = None,
    families: Sequence[Family] = (),
    side_effects: pd.DataFrame | None = None,
    random_texts: pd.DataFrame | None = None,
    token_divergence: pd.DataFrame | None = None,
    adapters: Adapter | None = None,
    adapter_texts: pd.DataFrame | None = None,
    factors: GatedFactors | None = None,
    factor_texts: pd.DataFrame | None = None,
    notes: str | Path | Notes | None = None,
    prompts: str | Sequence[str] | None = None,
    max_new_tokens: int = 50,
    title: str | None = None,
    run_folder: str | None = None,
    layer: int | None = None,
    chat: bool | None = None,
    batch_size: int = 32,
    judge: Judge | None = None,
    on_batch: OnBatch | None = None,
) -> pd.DataFrame:
    """Write one HTML file about a library: its settings, completions, numbers and figures.

    The file is replaced whole or not at all; it makes no network requests.

    Args:
        completions: as `collect_completions` gives them, of any scales and samples; None writes
            them. Those at scales 1 and -1 are grouped into behaviours.
        activation_map: the map that the vectors were found with; without it, neither effects nor
            the numbers of random vectors are shown.
        families: from `collect_family`; each gets a part of the page.
        side_effects: as `analysis.side_effects` gives it for these vectors.
        random_texts: as `Run.random_texts` gives them: the control of the behaviours.
        token_divergence: as `analysis.token_divergence` gives it for these vectors.
        adapters, adapter_texts: trained in the same folder, and what the model writes under each.
        factors, factor_texts: gated factors, likewise.
        notes: stars, names and remarks, as a path or as `read_notes` gives them.
        prompts: what to complete; None takes those of `completions`, or those of the metadata.
        title: the page's heading; None takes the prompt.
        run_folder: the folder of a run, for the commands that the page offers.
        judge: says stances and names of behaviours, as `behaviours` takes it.
        on_batch: called with about how many texts and vectors are done, and with all.

    Returns:
        The page's table, one row a vector and prompt: index, prompt, what the method measured,
        kl (KL(P_vector || P_unsteered) of the next token, in nats), specificity and loss_increase
        (with side effects), behaviour, completion, negated_completion.

    Raises:
        TypeError: the judge is no function.
        ValueError: no vectors or a zero one, no prompt, completions or side effects of others;
            notes that are none; also as `generate` and `kl_divergence` do.
        FileNotFoundError, PermissionError: the folder does not exist, or cannot be written to.
    """
    if not len(found):
        raise ValueError("found: holds no vectors; there is nothing to show")
    frames = {
        "completions": completions, "side_effects": side_effects, "random_texts": random_texts,
        "adapter_texts": adapter_texts, "factor_texts": factor_texts,
        "token_divergence": token_divergence,
    }  # fmt: skip
    _check_frames(found, frames)
    kept = notes_given(notes)
    check_optional_judge(judge)
    texts = _prompts(found, completions, prompts)
    _check_control(random_texts, completions, texts)
    # Before the completions are written: it refuses vectors of no norm.
    cosines = cosine_similarity(found)
    options: dict[str, Any] = {"layer": layer, "chat": chat, "batch_size": batch_size}
    written, steered, read, drawn = _tells(on_batch, len(found), len(texts), completions)
    # Opened before the work: a folder that cannot be written to shows at once.
    with replacing(path) as temporary:
        if completions is None:
            more: dict[str, Any] = options | {"max_new_tokens": max_new_tokens, "on_batch": written}
            completions = collect_completions(model, texts, found, **more)
        baselines = None
        if activation_map is not None:
            baselines = random_baseline(model, activation_map, found, texts, **options)
        top_tokens, kl = _data.measured_after(model, found, texts, steered, **options)
        groups = _grouped(model, completions, random_texts, found, chat, batch_size, judge, read)
        measured = Measured(kl, baselines, side_effects)
        data = _data.rows_data(found, texts, completions, groups, measured)
        effects = _parts.effects_of(found, activation_map)
        data |= {
            "library": _data.library_id(found),
            "folder": run_folder,
            "cosines": _data.cosines_data(cosines),
            "effects": _data.cosines_data(None if effects is None else effects.cosines),
            **_data.tokens_data(data["rows"], texts, top_tokens, token_divergence),
            "notes": kept,
            "tables": _tables(families, (adapters, adapter_texts), (factors, factor_texts)),
        }
        page = render(
            data,
            title=title,
            prompts=texts,
            seen=[as_seen(model, text, as_chat(found, chat)) for text in texts],
            **_facts.library_facts(found, baselines),
            **_facts.groups_told(groups, data, len(found), judge is not None),
            figures=_parts.library_figures(found, data, effects, side_effects),
            families=[_parts.family_part(part, activation_map) for part in families],
        )
        temporary.write_text(page, encoding="utf-8", newline="\n")
        drawn(1)
    return _table(found, completions, data, measured)


def _tells(
    on_batch: OnBatch | None, n_found: int, n_prompts: int, texts: pd.DataFrame | None
) -> list[Tell]:
    """What tells of texts to write, vectors to measure, texts to read, and vectors to draw."""
    n_texts = n_prompts * (1 + 2 * n_found) if texts is None else len(texts)
    n_written = n_texts if texts is None else 0
    return in_parts(on_batch, [n_written, 2 * n_found * n_prompts, n_texts, n_found])


def _tables(families: Sequence[Family], adapters: Any, factors: Any) -> dict[str, Any]:
    tables = _parts.adapter_tables(*adapters)
    tables |= _parts.adapter_tables(*factors, called="factor")
    for part in families:
        tables |= _parts.family_tables(part)
    return tables


def _prompts(
    found: SteeringVectors,
    completions: pd.DataFrame | None,
    prompts: str | Sequence[str] | None,
) -> list[str]:
    if completions is not None:
        prompts = completions["prompt"].tolist()
    chosen = found.story.get("prompts") if prompts is None else prompts
    return list(dict.fromkeys(checks.as_texts(chosen or [])))


def _grouped(
    model: Model,
    completions: pd.DataFrame,
    random_texts: pd.DataFrame | None,
    found: SteeringVectors,
    chat: bool | None,
    batch_size: int,
    judge: Judge | None,
    on_batch: Tell,
) -> Behaviours | None:
    """Behaviours of vectors and negatives; None where nothing was written at scales 1 and -1.

    Random vectors are among them, numbered after the library's own.
    """
    some = completions.assign(control=False)
    if random_texts is not None:
        after = random_texts.assign(vector=random_texts["vector"] + len(found), control=True)
        some = pd.concat([some, after], ignore_index=True)
    some = pd.DataFrame(some[(some["vector"] < 0) | (some["scale"].abs() == 1)])
    if all(some["control"]):
        return None
    # Its logits are of whole texts: 8 at once take as much memory as many rows of others.
    options: dict[str, Any] = {"batch_size": min(batch_size, 8), "on_batch": on_batch}
    return behaviours(model, some, chat=as_chat(found, chat), judge=judge, **options)


def _table(
    found: SteeringVectors,
    completions: pd.DataFrame,
    data: Mapping[str, Any],
    measured: Measured,
) -> pd.DataFrame:
    """One row a prompt and vector, as `write` returns it."""
    names = {card["key"]: card["name"] for card in data["behaviours"]}
    named = ["prompt", "vector", "scale"]
    first = _data.greedy_first(completions).drop_duplicates(named).set_index(named)
    written: Any = first["completion"].to_dict().get
    prompts = list(dict.fromkeys(prompt for prompt, _ in measured.kl))
    rows = [row for row in data["rows"] if row["sign"] > 0]
    places = [(prompts[row["prompt"]], row["vector"]) for row in rows]
    vectors = [vector for _, vector in places]
    table = Table({"index": found.columns["index"][vectors].tolist()})
    table["prompt"] = [prompt for prompt, _ in places]
    if measure := _facts.measure_shown(found):
        table[measure["column"]] = found.columns[measure["column"]][vectors].tolist()
    table["kl"] = [measured.kl[prompt, 1][vector] for prompt, vector in places]
    if measured.side_effects is not None:
        for cost in (column.name for column in _data.COSTS):
            table[cost] = measured.side_effects[cost].astype(float).to_numpy()[vectors]
    asides = [f"filtered out: {row['filtered']}" if row["filtered"] else None for row in rows]
    table["behaviour"] = [*map(names.get, (row["behaviour"] for row in rows), asides)]
    for name, scale in (("completion", 1.0), ("negated_completion", -1.0)):
        table[name] = [written((*place, scale)) for place in places]
    return table


# The columns that each frame has, and where it comes from.
_FRAMES: Mapping[str, tuple[Sequence[str], str]] = {
    "completions": (COMPLETION_COLUMNS, "what report.collect_completions returns"),
    "random_texts": (COMPLETION_COLUMNS, "what Run.random_texts returns"),
    "adapter_texts": (("vector", "prompt", "completion"), "what Run.adapter_texts returns"),
    "factor_texts": (("vector", "prompt", "completion"), "what Run.factor_texts returns"),
    "token_divergence": (_data.DIVERGENCE, "what analysis.token_divergence returns"),
    "side_effects": (COLUMNS, "what analysis.side_effects returns"),
}


def _check_control(
    texts: pd.DataFrame | None, completions: pd.DataFrame | None, prompts: Sequence[str]
) -> None:
    """Make sure that texts are of random vectors alone, and were written as the completions."""
    if texts is None:
        return
    advice = "pass what Run.random_texts returns"
    if min(texts["vector"], default=0) < 0:
        raise ValueError(f"random_texts: has unsteered texts (vector -1); {advice}")
    if unknown := {*texts["prompt"]} - {*prompts}:
        what = quoted(printable(str(unknown.pop())))
        raise ValueError(f"random_texts: has texts after {what}, no prompt of the page; {advice}")
    if ("sample" in texts) != (completions is not None and "sample" in completions):
        raise ValueError(
            "random_texts: has a column sample where completions has none, or the reverse; "
            "write as many samples of each"
        )


def _check_frames(found: SteeringVectors, given: Mapping[str, pd.DataFrame | None]) -> None:
    frames = {name: frame for name, frame in given.items() if frame is not None}
    for name, frame in frames.items():
        columns, source = _FRAMES[name]
        numbers = name == "side_effects"
        checks.columns(frame, columns, name, f"pass {source}", numbers=numbers)
    last = len(found) - 1
    texts, costs = frames.get("completions"), frames.get("side_effects")
    if texts is not None and (unknown := sorted({*texts["vector"]} - {*range(-1, len(found))})):
        raise ValueError(
            f"completions: has texts of vectors {unknown[:10]}, but found holds 0 to {last}; "
            "pass the completions of these vectors"
        )
    if costs is not None and [*costs["vector"]] != [*range(len(found))]:
        raise ValueError(
            f"side_effects: {len(costs)} rows that are not those of vectors 0 to {last}, in "
            "order; measure the vectors of found"
        )
