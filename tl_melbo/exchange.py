"""Vectors for other programs: llama.cpp and repeng, the steering-vectors package, a model hub."""

import json
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from torch import Tensor

from tl_melbo.files import replacing
from tl_melbo.story import about_of
from tl_melbo.text import printable

if TYPE_CHECKING:
    from steering_vectors import SteeringVector

    from tl_melbo.vectors import SteeringVectors

HUB_FILE = "vectors.safetensors"
_CONTROL_VECTOR = "controlvector"
_MOST_CARD_ROWS = 40


def write_control_vector(
    path: str | Path, library: "SteeringVectors", layer: int | None, model_type: str | None
) -> None:
    """Write a GGUF file that llama.cpp and repeng read: `direction.N` is added after block N.

    Raises:
        ValueError: more or fewer than one vector; no layer or model type known; the layer is 0,
            where llama.cpp adds nothing.
        OSError: as `files.replacing` does.

    Source: llama.cpp, common_control_vector_load and llama_adapter_cvec; repeng 0.4,
    ControlVector.export_gguf.
    """
    import gguf

    model_type = library.story.get("model_type") if model_type is None else model_type
    if not model_type:
        raise ValueError(
            "model_type: not given, and the story does not tell; pass the one in the model's "
            "config, for example model_type='llama'"
        )
    theta, layer = _one(library, "to_repeng_gguf"), _layer(library, layer)
    if layer < 1:
        raise ValueError(
            f"layer={layer}: llama.cpp adds control vectors after blocks 1 and later; a vector "
            "for block 0 cannot be written to such a file"
        )
    with replacing(path) as temporary:
        writer = gguf.GGUFWriter(temporary, _CONTROL_VECTOR)
        try:
            writer.add_string(f"{_CONTROL_VECTOR}.model_hint", model_type)
            writer.add_uint32(f"{_CONTROL_VECTOR}.layer_count", 1)
            writer.add_tensor(f"direction.{layer}", theta.float().cpu().contiguous().numpy())
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()


def as_steering_vector(library: "SteeringVectors", layer: int | None) -> "SteeringVector":
    """An object of the steering-vectors package.

    Raises:
        ValueError: more or fewer than one vector, or no layer known.
        ModuleNotFoundError: the package is not installed.
    """
    theta, layer = _one(library, "to_steering_vectors"), _layer(library, layer)
    try:
        from steering_vectors import SteeringVector
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "to_steering_vectors needs the package steering-vectors, which asks for an older "
            "transformers than it needs: pip install --no-deps steering-vectors scikit-learn"
        ) from error
    return SteeringVector(layer_activations={layer: theta.clone()}, layer_type="decoder_block")


def _one(library: "SteeringVectors", function: str) -> Tensor:
    if len(library) != 1:
        raise ValueError(
            f"{function}: takes exactly one vector, and there are {len(library)}; pick one, as "
            f"found[3].{function}(...)"
        )
    return library.vectors[0]


def _layer(library: "SteeringVectors", layer: int | None) -> int:
    layer = library.story.get("source_layer") if layer is None else layer
    if layer is None:
        raise ValueError(
            "layer: not given, and the story does not tell where the vectors belong; pass "
            "layer=, for example layer=8"
        )
    if layer < 0:
        raise ValueError(f"layer={layer}: 0 or more")
    return layer


def upload(
    library: "SteeringVectors",
    repo_id: str,
    private: bool,
    completions: pd.DataFrame | None,
    token: str | None,
) -> str:
    """Put a library, with a card, into a repository of the Hugging Face hub; gives its address.

    Raises:
        ValueError, OSError: as `SteeringVectors.push_to_hub`.
    """
    from huggingface_hub import HfApi

    if not len(library):
        raise ValueError("the library holds no vectors; there is nothing to push")
    wanted = {"vector", "scale", "prompt", "completion"}
    if completions is not None and not wanted <= set(completions.columns):
        raise ValueError(
            f"completions: lacks the columns {sorted(wanted - set(completions.columns))}; pass "
            "what tm.generate returns"
        )
    card = model_card(repo_id, library.story, library.table(), completions)
    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as folder:
        library.save(Path(folder) / HUB_FILE)
        (Path(folder) / "README.md").write_text(card, encoding="utf-8", newline="\n")
        address = api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="Steering vectors")
    return str(address)


def download(repo_id: str, revision: str | None, token: str | None) -> Path:
    """Fetch the vectors of a repository of the Hugging Face hub, or find them in its cache.

    Raises:
        FileNotFoundError: there is no such repository or revision, or none that may be read; or it
            holds no vectors of ours.
        OSError: the hub cannot be reached.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        return Path(hf_hub_download(repo_id, HUB_FILE, revision=revision, token=token))
    except LocalEntryNotFoundError as error:
        raise OSError(
            f"repo_id={repo_id!r}: the hub cannot be reached, and {HUB_FILE} is not in its cache; "
            "look at the network, or load a file with SteeringVectors.load"
        ) from error
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        at = "" if revision is None else f" at revision {revision!r}"
        raise FileNotFoundError(
            f"repo_id={repo_id!r}{at}: not on the hub, or private; check the name, or log in with "
            "`hf auth login`"
        ) from error
    except EntryNotFoundError as error:
        raise FileNotFoundError(
            f"repo_id={repo_id!r}: holds no {HUB_FILE}; it is not one that push_to_hub wrote"
        ) from error


def model_card(
    repo_id: str,
    story: Mapping[str, Any],
    table: pd.DataFrame,
    completions: pd.DataFrame | None,
) -> str:
    """The README of a repository: what the vectors are, how they were found, how to use them."""
    from huggingface_hub import ModelCardData

    # Of a folder, its name: where it lies is nobody's business.
    model = str(story.get("model") or "an unnamed model")
    model = model if _is_repository(model) else Path(model).name
    method = story.get("method")
    data = ModelCardData(
        library_name="tl_melbo",
        tags=["steering-vectors", "transformer-lens", "tl_melbo", *([method] if method else [])],
        # The hub takes ids for this, and refuses the whole card for anything else.
        base_model=model if _is_repository(model) else None,
    )
    left_out = ("categories", "parts", "model")
    facts = {"model": model, **{k: v for k, v in story.items() if k not in left_out}}
    for number, part in enumerate(story.get("parts", [])):
        facts[f"part {number}"] = {k: v for k, v in part.items() if k not in left_out}
    layer = story.get("source_layer")
    place = "after a block that is not told" if layer is None else f"after block {layer}"
    lines = [
        f"---\n{data.to_yaml()}\n---",
        f"# Steering vectors of {_cell(model)}",
        f"{len(table)} direction{'' if len(table) == 1 else 's'} in the residual stream {place}"
        ": added while the model writes, one can make it write something else. "
        f"{about_of(story)} Read what each does before you trust it.",
        f'```python\nimport tl_melbo as tm\n\nfound = tm.SteeringVectors.from_hub("{repo_id}")\n'
        f"with tm.steered(model, found[0]{', layer=...' if layer is None else ''}):"
        "  # a TransformerLens model\n"
        '    print(model.generate("Hello"))\n```',
        "## How they were found",
        _markdown_table(["", ""], [[name, value] for name, value in facts.items()]),
        "## The vectors",
        _markdown_table(
            list(table.columns),
            [list(row.values()) for row in table.head(_MOST_CARD_ROWS).to_dict("records")],
        ),
    ]
    if len(table) > _MOST_CARD_ROWS:
        lines.append(f"The first {_MOST_CARD_ROWS} of {len(table)}; the file holds all of them.")
    if completions is not None:
        lines += _written(table, completions)
    return "\n\n".join(lines) + "\n"


def _written(table: pd.DataFrame, completions: pd.DataFrame) -> list[str]:
    """The part of the card on completions, vectors called by the numbers that the table has."""
    numbers = {-1: -1, **dict(enumerate(table["index"].tolist()))}
    rows = [
        [numbers.get(row["vector"]), row["scale"], row["prompt"], row["completion"]]
        for row in completions.head(_MOST_CARD_ROWS).to_dict("records")
    ]
    return [
        "## What the model writes",
        "Vector −1 is the model without one.",
        _markdown_table(["vector", "scale", "prompt", "completion"], rows),
    ]


def _markdown_table(header: list[str], rows: list[list[Any]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    lines += ["| " + " | ".join(_cell(value) for value in row) + " |" for row in rows]
    return "\n".join(lines)


def _is_repository(name: str) -> bool:
    """Whether it can be the id of a model on the hub: user/name."""
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name, re.ASCII) is not None and not (
        Path(name).exists()
    )


def _cell(value: Any) -> str:
    """Text for a Markdown table: untrusted, on one line, and nothing in it is markup or a link."""
    if isinstance(value, float):
        return f"{value:.4g}"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    text = " ".join(printable(text).split())
    # A full stop before a letter can make a link of what is around it.
    text = re.sub(r"\.(?=\w)", "&#46;", re.sub(r"[^\w\s.,'?()-]", _entity, text))
    return text.replace("_", "&#95;")


def _entity(found: re.Match[str]) -> str:
    return f"&#{ord(found[0])};"
