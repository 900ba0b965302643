"""Steering vectors and where they came from: slicing, arithmetic, saving, loading."""

import html
import importlib
import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from torch import Tensor

from tl_melbo import checks, exchange, vectors_file
from tl_melbo.shapes import Float, Theta, shape_checked
from tl_melbo.stored import VectorLibrary
from tl_melbo.story import now
from tl_melbo.tables import Table
from tl_melbo.text import printable

if TYPE_CHECKING:
    from steering_vectors import SteeringVector


@dataclass(frozen=True, eq=False, repr=False, init=False)
class SteeringVectors(VectorLibrary):
    """A library of steering vectors, with the story of how it was made.

    Slicing, arithmetic and `concatenate` give new libraries; nothing changes one in place.

    Attributes:
        vectors: float32, on the CPU, in the units of the residual stream.
        story: JSON-ready facts: method, model, prompts, layers, every hyperparameter, seed,
            versions, date. Read-only.
        columns: by name, one number a vector, such as "objective", which `table()` shows; or one
            row a vector, such as the output direction that belongs to it.
        history: the objective after each step of the search; NaN after a vector's last step.
    """

    kind = vectors_file.VECTORS
    vectors: Theta

    @shape_checked
    def __init__(
        self,
        vectors: Theta,
        story: Mapping[str, Any] = {},
        columns: Mapping[str, Tensor] = {},
        history: Float[Tensor, "vector step"] | None = None,
    ) -> None:
        if not vectors.shape[1]:
            raise ValueError(
                f"vectors: shape ({len(vectors)}, 0); a vector has at least one number"
            )
        super().__init__(vectors=vectors, story=story, columns=columns, history=history)

    @classmethod
    @shape_checked
    def from_tensor(
        cls,
        vectors: Float[Tensor, "d_model"] | Theta,
        *,
        source_layer: int | None = None,
        model: str | None = None,
        method: str = "from_tensor",
    ) -> "SteeringVectors":
        """Take one vector or several that were made elsewhere, in the residual stream's units.

        Args:
            source_layer: the layer after which they are to be added.
            method: how they were made, in a word.

        Raises:
            ValueError: a value is not finite.
        """
        checks.at_least(0, source_layer=source_layer)
        theta = vectors[None] if vectors.ndim == 1 else vectors
        story = {"method": method, "model": model, "d_model": theta.shape[1]}
        return cls(theta, {**story, "source_layer": source_layer, "date": now()})

    @property
    def objective(self) -> Float[Tensor, "vector"] | None:
        """What the search reached for each vector, or None where that is not known."""
        return self.columns.get("objective")

    @property
    def source_layer(self) -> int | None:
        """The layer after which the vectors are added, or None where that is not known."""
        return self.story.get("source_layer")

    def table(self) -> Table:
        """One row a vector: index, norm, objective and whatever other number is known of each."""
        frame = Table({"index": self.columns["index"].numpy(), "norm": self.norms.numpy()})
        categories = self.story.get("categories", {})
        for name, column in self.columns.items():
            if name in categories:
                frame[name] = pd.Categorical.from_codes(column.tolist(), categories[name])
            elif name != "index" and column.ndim == 1:
                frame[name] = column.numpy()
        return frame

    @shape_checked
    def to_repeng_gguf(
        self, path: str | Path, *, layer: int | None = None, model_type: str | None = None
    ) -> None:
        """Write one vector as a control vector for llama.cpp and repeng.

        `llama-cli --control-vector FILE` adds it as it is, `--control-vector-scaled FILE:0.5` at
        half its norm (`FILE 0.5` in older versions). In repeng, give `ControlModel` the layer.

        Args:
            layer: the block after which it is added; None takes the vectors' source layer.
            model_type: as in a Hugging Face config, "llama" for example; None takes the story's.

        Raises:
            ValueError: more or fewer than one vector; layer 0, or none known; no model type known.
        """
        directions = exchange.direction(self, layer, "to_repeng_gguf")
        exchange.write_control_vector(path, directions, model_type or self.story.get("model_type"))

    @shape_checked
    def to_steering_vectors(self, *, layer: int | None = None) -> "SteeringVector":
        """One vector as an object of the steering-vectors package, for a Hugging Face model.

            with found[3].to_steering_vectors().apply(hugging_face_model):
                ...

        `layer` and errors are those of `to_repeng_gguf`.
        """
        return exchange.as_steering_vector(exchange.direction(self, layer, "to_steering_vectors"))

    @shape_checked
    def bake(
        self,
        model: Any,
        path: str | Path,
        *,
        layer: int | None = None,
        source: str | Path | None = None,
    ) -> Path:
        """Write the model with one vector in it, for programs that know no vectors; gives the path.

        The vector becomes a bias on the MLP output projection of its block: an ordinary checkpoint
        with its tokenizer (Llama, GPT-2, GPT-NeoX; Qwen2 is written as Llama), or a `.gguf` file.

        Args:
            path: a new or empty folder; or a new file whose name ends in .gguf.
            layer: the block after which the vector is added; None takes its source layer.
            source: the GGUF file to copy, llama models only; None takes the one that `model` was
                loaded from.

        Raises:
            ValueError: more or fewer than one vector, or no layer known; a model whose blocks
                cannot hold it, such as Gemma's, which normalise what the MLP writes.
            FileExistsError: something is in the folder, or there is such a file.
        """
        # By its name, since it knows models, which nothing that this module imports may do.
        baking = importlib.import_module("tl_melbo.baking")
        return baking.bake(model, self, path, layer, source=source)

    @shape_checked
    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool = True,
        completions: pd.DataFrame | None = None,
        page: str | Path | None = None,
        token: str | None = None,
    ) -> str:
        """Put the vectors on the Hugging Face hub; gives their address.

        A model card there tells the story, prompts included.

        Args:
            repo_id: "user/name"; made if need be, its card and vectors replaced.
            completions: what the model writes under them, as `generate` gives it, for the card.
            page: the file that `report.write` or a run wrote, to go with them; the card leads to
                it. It holds the texts, and the name of the run's folder.
            token: of your account; None takes the one that `hf auth login` left.

        Raises:
            ValueError: no vectors, a name that the hub does not allow, or another frame.
            OSError: the page is not there; the hub cannot be reached, or forbids it.
        """
        from huggingface_hub import HfApi

        if not len(self):
            raise ValueError("the library holds no vectors; there is nothing to push")
        if completions is not None:
            advice = "pass what tm.generate returns"
            checks.columns(completions, exchange.COMPLETION, "completions", advice)
        if page is not None and not Path(page).expanduser().is_file():
            raise FileNotFoundError(
                f"page={str(page)!r}: no such file; tl_melbo.report.write makes one"
            )
        card = exchange.model_card(repo_id, self.story, self.table(), completions, page is not None)
        api = HfApi(token=token)
        with tempfile.TemporaryDirectory() as folder:
            self.save(Path(folder) / exchange.HUB_FILE)
            if page is not None:
                shutil.copyfile(Path(page).expanduser(), Path(folder) / exchange.HUB_PAGE)
            (Path(folder) / "README.md").write_text(card, encoding="utf-8", newline="\n")
            try:
                address = api.create_repo(repo_id, private=private, exist_ok=True)
                api.upload_folder(
                    repo_id=repo_id, folder_path=folder, commit_message="Steering vectors"
                )
            except (OSError, ValueError):  # the hub's own, and bad names
                raise
            except Exception as error:  # of the HTTP library that huggingface_hub has
                raise OSError(
                    f"repo_id={repo_id!r}: the hub cannot be reached ({error}); look at the "
                    "network, or keep a file with SteeringVectors.save"
                ) from error
        return str(address)

    @classmethod
    @shape_checked
    def from_hub(
        cls, repo_id: str, *, revision: str | None = None, token: str | None = None
    ) -> "SteeringVectors":
        """Fetch what `push_to_hub` put there; a file already fetched is taken from the cache.

        Args:
            revision: a branch, tag or commit; None takes the newest.

        Raises:
            OSError: there is no such repository or revision, or the hub cannot be reached.
            ValueError: a name that the hub does not allow, or a file that `load` refuses.
        """
        import huggingface_hub
        from huggingface_hub import errors

        file = exchange.HUB_FILE
        place = f"repo_id={repo_id!r}" + ("" if revision is None else f" at revision {revision!r}")
        try:
            fetched = huggingface_hub.hf_hub_download(repo_id, file, revision=revision, token=token)
        except errors.LocalEntryNotFoundError as error:
            raise OSError(
                f"{place}: the hub cannot be reached, and {file} is not in its cache; look at the "
                "network, or load a file with SteeringVectors.load"
            ) from error
        except (
            errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.EntryNotFoundError,
        ) as error:  # fmt: skip
            raise FileNotFoundError(
                f"{place}: the hub has no {file} there, or it is private; check the name, or log "
                "in with `hf auth login`"
            ) from error
        return cls.load(fetched)

    def __repr__(self) -> str:
        return f"SteeringVectors({self._summary()})"

    def _summary(self) -> str:
        count = f"{len(self)} vector{'' if len(self) == 1 else 's'}"
        parts = [f"{count} of width {self.vectors.shape[1]}"]
        if len(self):
            low, high = float(self.norms.min()), float(self.norms.max())
            same = high - low <= 1e-3 * high
            parts.append(f"norm {high:.4g}" if same else f"norms {low:.4g} to {high:.4g}")
        parts += [str(self.story[fact]) for fact in ("method", "model") if self.story.get(fact)]
        if self.source_layer is not None:
            target = self.story.get("target_layer")
            arrow = "" if target is None else f" -> {target}"
            parts.append(f"layer {self.source_layer}{arrow}")
        return printable(", ".join(parts))

    def _repr_html_(self) -> str:
        story = html.escape(printable(json.dumps(dict(self.story), indent=2, ensure_ascii=False)))
        return (
            f"<p><b>SteeringVectors</b>: {html.escape(self._summary())}</p>"
            f"{self.table()._repr_html_()}"
            f"<details><summary>Story</summary><pre>{story}</pre></details>"
        )
