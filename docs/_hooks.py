"""Pages that mkdocs makes as it builds: one for each public name, and one for each notebook."""

import importlib
import re
from pathlib import Path
from typing import Any

import nbformat
from latex2mathml.converter import convert
from mkdocs.structure.files import File
from nbconvert import MarkdownExporter

ROOT = Path(__file__).resolve().parent.parent
MODULES = (
    "",
    "adapters",
    "analysis",
    "course",
    "engines",
    "evaluation",
    "judges",
    "plots",
    "report",
)
_HEIRS = ("Adapter", "GatedFactors", "LayeredVectors", "Run", "SteeringVectors")
_OPTIONS = {
    **dict.fromkeys(_HEIRS, "      inherited_members: true\n"),
    # Its fields are not arguments: `from_prompts` makes it.
    "ActivationMap": "      merge_init_into_class: false\n",
}
# What a page shows beside its name.
_BESIDE = {"PRESETS": "\n::: tl_melbo.presets.Preset\n"}
_MATH = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)


def public_names(module: str) -> list[str]:
    """What a module offers, without the modules in it."""
    package = importlib.import_module(f"tl_melbo.{module}" if module else "tl_melbo")
    return [name for name in package.__all__ if name not in MODULES]


def on_files(files: Any, config: Any) -> Any:
    for module in MODULES:
        title = f"tl_melbo.{module}" if module else "tl_melbo"
        folder = module or "tl_melbo"
        names = public_names(module)
        for name in names:
            options = f"    options:\n{_OPTIONS[name]}" if name in _OPTIONS else ""
            text = f"::: {title}.{name}\n{options}{_BESIDE.get(name, '')}"
            _add(files, config, f"reference/{folder}/{name}.md", text)
        rows = [
            f"| [`{name}`]({folder}/{name}.md) | {_first_line(title, name)} |" for name in names
        ]
        head = f"# {title}\n\n| name | |\n|---|---|\n"
        _add(files, config, f"reference/{folder}.md", head + "\n".join(rows) + "\n")
    for path in sorted((ROOT / "notebooks").glob("[0-9]*.ipynb")):
        text, resources = _exported(path)
        for name, content in resources["outputs"].items():
            _add(files, config, f"notebooks/{path.stem}/{name}", content)
            text = text.replace(f"]({name})", f"]({path.stem}/{name})")
        # What is folded away is text to be rendered, too.
        text = text.replace("<details>", '<details markdown="1">')
        _add(files, config, f"notebooks/{path.stem}.md", text)
    return files


def _exported(path: Path) -> tuple[str, Any]:
    """A notebook as Markdown, its pictures with what they show."""
    notebook, told = nbformat.read(path, 4), []
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if "text/html" in data:  # indented after an empty line, it would be code
                data["text/html"] = re.sub(r"\n\s+", "\n", data["text/html"])
            elif "image/png" in data:
                told.append(output["metadata"]["image/png"]["alt"])
    text, resources = MarkdownExporter().from_notebook_node(notebook)
    alts = iter(told)
    return re.sub(r"!\[png\]", lambda _: f"![{next(alts)}]", text), resources


def on_page_markdown(markdown: str, **_: Any) -> str:
    """What links to a notebook's file, for readers of the repository, links to its page here."""
    return re.sub(r"\]\(\.\./notebooks/(\w+)\.ipynb\)", r"](notebooks/\1.md)", markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Formulas as MathML, which browsers draw without a script."""

    def drawn(match: re.Match[str]) -> str:
        kind, formula = match.groups()
        return convert(_plain(formula), display="block" if kind == "div" else "inline")

    return _MATH.sub(drawn, html)


def _add(files: Any, config: Any, uri: str, content: str | bytes) -> None:
    files.append(File.generated(config, uri, content=content))


def _first_line(title: str, name: str) -> str:
    thing = getattr(importlib.import_module(title), name)
    text = thing.__doc__ if callable(thing) else None
    return (text or "").strip().partition("\n")[0].replace("|", "\\|")


def _plain(formula: str) -> str:
    for escaped, sign in (("&lt;", "<"), ("&gt;", ">"), ("&amp;", "&")):
        formula = formula.replace(escaped, sign)
    return formula
