"""What is made of a folder's vectors: texts, side effects, families, the page. Loaded when used."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

import tl_melbo as tm
from tl_melbo import report
from tl_melbo.activation_map import ActivationMap
from tl_melbo.analysis._family import Family
from tl_melbo.analysis._side_effects import COLUMNS, side_effects
from tl_melbo.model.bridge import Model, model_name
from tl_melbo.run._folder import (
    COMPLETIONS,
    REFERENCE,
    REPORT,
    VECTORS,
    family_folder,
    kept_before,
    same_vector,
)
from tl_melbo.run._settings import SETTINGS, absolute, digest
from tl_melbo.run._tables import damaged, load_table, save_table
from tl_melbo.vectors import SteeringVectors

__all__ = ["report", "save_table", "side_effects"]

TABLE, COMPOSITION, SIDE_EFFECTS = "family.csv", "composition.csv", "side_effects.csv"
_UNKNOWN = object()


def load_model(
    folder: Path, found: SteeringVectors, settings: dict[str, Any], model: str | None, device: Any
) -> tuple[Model, ActivationMap]:
    """The model and the map that a folder's vectors were found with.

    Raises:
        ValueError: the folder does not tell it, or it is another model.
    """
    story = found.story
    facts = ("model", "prompts", "source_layer", "target_layer")
    lacking = [fact for fact in facts if story.get(fact) is None]
    if lacking:
        raise ValueError(
            f"{folder / VECTORS}: its story does not tell {', '.join(lacking)}; in Python, "
            "tm.melbo_ortho(f, theta0) takes any vector"
        )
    known = settings.get("model", _UNKNOWN)
    if model is not None and known not in (_UNKNOWN, absolute(model)):
        name = "the bundled one" if known is None else known
        raise ValueError(f"model={model}: the vectors in {folder} are of {name}; leave --model out")
    name = settings.get("model") if model is None else model
    dtype = getattr(torch, str(story.get("dtype", "float32")), None)
    if not isinstance(name, str | None) or not isinstance(dtype, torch.dtype):
        raise ValueError(f"{folder}: its settings make no sense; name the model with --model")
    loaded = tm.load_model(name, device=device, dtype=dtype)
    if model_name(loaded) != story["model"]:
        raise ValueError(
            f"--model: {model_name(loaded)}, but the vectors in {folder} are of {story['model']}; "
            "name that model's hub id, folder or file"
        )
    layers = {name: story[name] for name in ("source_layer", "target_layer")}
    chat = bool(story.get("chat"))
    return loaded, ActivationMap.from_prompts(loaded, story["prompts"], **layers, chat=chat)


def load_texts(
    folder: Path, found: SteeringVectors, settings: dict[str, Any], max_new_tokens: int | None
) -> pd.DataFrame | None:
    """The texts that a folder holds, if they are those of its vectors, and of this length.

    Raises:
        Damaged: the file cannot be read.
    """
    path = folder / COMPLETIONS
    if not path.is_file():
        return None
    table = load_table(path, report.COMPLETION_COLUMNS)
    numbers = table[["vector", "scale"]].to_numpy(dtype=float)
    whole = np.isfinite(numbers).all() and (numbers[:, 0] == np.round(numbers[:, 0])).all()
    if not whole or not table["prompt"].str.strip().all():
        raise damaged(path)
    own = digest(found)
    same = settings.get("texts_of", own) == own
    same &= max_new_tokens is None or settings.get("max_new_tokens") in (None, max_new_tokens)
    same &= sorted(set(table["vector"])) == list(range(-1, len(found)))
    return table if same else None


def load_side_effects(
    folder: Path, found: SteeringVectors, settings: dict[str, Any]
) -> pd.DataFrame | None:
    """What a folder's vectors cost elsewhere, if that was measured of these vectors.

    Raises:
        Damaged: the file cannot be read.
    """
    path = folder / SIDE_EFFECTS
    if not path.is_file() or "side_effects_of" not in settings:
        return None
    table = load_table(path, COLUMNS)
    if settings["side_effects_of"] != digest(found):
        return None
    if [*table["vector"]] != [*range(len(found))]:
        raise damaged(path)
    return table


def check_may_measure(folder: Path, settings: dict[str, Any]) -> None:
    """Make sure that side effects would replace no table of somebody else.

    Raises:
        ValueError: they would.
    """
    path = folder / SIDE_EFFECTS
    if path.is_file() and "side_effects_of" not in settings:
        raise ValueError(
            f"{path}: no run left it; move it elsewhere, or pass overwrite=True to replace it and "
            "the run"
        )


def load_families(folder: Path, found: SteeringVectors) -> list[Family]:
    """The measured families of a run's vectors, by number of vector.

    Families of vectors that the library no longer holds are left out, and so are those that are
    not measured yet, or were measured before their last vectors came.

    Raises:
        Damaged: a file cannot be read.
    """
    families = []
    for position, index in enumerate(found.columns["index"].tolist()):
        place = family_folder(folder, index)
        if not all((place / name).is_file() for name in (VECTORS, REFERENCE, TABLE, COMPOSITION)):
            continue
        reference = SteeringVectors.load(place / REFERENCE)
        if not same_vector(reference, found[position]):
            continue
        vectors = SteeringVectors.load(place / VECTORS)
        table = load_table(place / TABLE, ("kind", "index", "norm", "completion"))
        measured = table.loc[table["kind"] == "family", "norm"].to_numpy()
        if len(measured) != len(vectors) or not np.allclose(measured, vectors.norms, rtol=1e-3):
            continue
        composed = load_table(place / COMPOSITION, ("size", "members", "completion"))
        families.append(Family(reference, vectors, table, composed))
    return families


def save_family(place: Path, family: Family) -> None:
    """Keep what was measured of a family beside its vectors."""
    save_table(place / TABLE, family.table)
    save_table(place / COMPOSITION, family.composition)


def check(folder: Path, settings: dict[str, Any], side_effects: bool) -> None:
    """As `Run.check`."""
    names = (COMPLETIONS, REPORT, SETTINGS, SIDE_EFFECTS)
    theirs = [name for name in names if (folder / name).exists()]
    if theirs and not (folder / VECTORS).is_file():
        raise ValueError(
            f"{folder}: holds {', '.join(theirs)}, but no {VECTORS}, so not the rest of a "
            "run; choose another folder, or pass overwrite=True to replace them"
        )
    if side_effects:
        check_may_measure(folder, settings)
    found = kept_before(folder, None)
    if found is None:
        return
    load_texts(folder, found, settings, None)
    load_side_effects(folder, found, settings)
    load_families(folder, found)
