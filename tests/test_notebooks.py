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

from notebooks.build import HERE, NAMES, run, tidied  # noqa: E402
from tests.conftest import wait_for  # noqa: E402

# As they are printed, at full budget on the embedded model; and with little work on a tiny one.
TINY = {"SOURCE_LAYER": 1, "TARGET_LAYER": 4, "RADIUS": 4.0}
SMALL = {
    "01_first_vectors": {"N_VECTORS": 4, "MAX_NEW_TOKENS": 4, "SCALES": [0.5, 1.0]},
    "03_how_does_it_do_it": {"CHOSEN": 1, "N_RANDOM": 4, "MAX_NEW_TOKENS": 4},
    "04_exercises": {"MAX_NEW_TOKENS": 4},
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
}
# Figures, tables of ours, and coloured tokens, that each shows at least.
SHOWN = {
    "01_first_vectors": (4, 5, 1),
    "03_how_does_it_do_it": (6, 0, 0),
    "04_exercises": (0, 0, 0),
    "04_orthogonal_families": (5, 3, 0),
    "05_other_ways": (2, 3, 0),
    "06_audit_game": (1, 2, 0),
    "07_your_question": (1, 2, 0),
}


def outputs(notebook):
    return [o for cell in notebook.cells if cell.cell_type == "code" for o in cell.outputs]


def pages(notebook):
    return [o["data"].get("text/html", "") for o in outputs(notebook) if "data" in o]


def counted(notebook):
    figures = sum("application/vnd.plotly.v1+json" in o.get("data", {}) for o in outputs(notebook))
    tables = sum("<table>" in page for page in pages(notebook))
    tokens = sum('<div id="static-circuits-vis' in page for page in pages(notebook))
    return figures, tables, tokens


ANSWERS = {  # wrong ones, and what the student is told
    "check_1(torch.randn(d_model))": "Its length is",
    "check_1([1, 2])": "A tensor is wanted",
    "check_1(torch.ones(d_model) * RADIUS / d_model**0.5)": "hardly random",
    "check_1(RADIUS * random_vector.abs() / random_vector.norm())": "are negative",
    "check_2(f.delta(random_vector[None]).norm(dim=-1))": "one is wanted",
    "check_2(1.0)": "Another number. Is it the norm",
    "check_2(f.delta(random_vector[None]).norm())": "over all tokens together",
    "check_3(tm.melbo(f, 3, RADIUS, steps=1))": "There are 3; four are wanted",
    "check_3(3 * found)": "Their lengths are",
    "check_3(tm.melbo(f, 4, RADIUS, steps=9, orthogonal=False))": "not orthogonal",
    "check_3(tm.SteeringVectors.from_tensor(torch.eye(d_model)[:4]))": "not found by tm.melbo",
    "check_4(texts[texts.scale == 1])": "1 and -1 are wanted",
    "check_4(tm.generate(model, 'Hi!', found, scales=[1, -1], max_new_tokens=2))": "After 'Tell",
    "check_4(texts.assign(completion='x'))": "Did you give max_new_tokens",
    "check_4(texts[['completion']])": "as it is",
    "check_5(tm.analysis.cosine_similarity(found))": "That is of the vectors",
    "check_5(tm.analysis.cosine_similarity(f.delta(found.vectors)))": "over all tokens",
    "check_5(torch.eye(3))": "4 x 4 is wanted",
    "check_6(0.25)": "At 0.25 it is not the largest",
    "check_6(7)": "7 is none of",
    "check_6(texts.iloc[0])": "One number is wanted",
    "check_7(found[0])": "of that of no vector",
    "check_7(found[3])": "not orthogonal to",
}
RIGHT = [  # other ways to do it
    "check_3(0.5 * tm.melbo(f, 4, 2 * RADIUS))",
    "check_7(tm.melbo_ortho(f, found[3], 1, steps=60))",
    "check_5(cosines.numpy())",
]
TRY = """
for answer in {answers!r}:
    try:
        eval(answer)
        print("ACCEPTED", answer)
    except AssertionError as error:
        print("TOLD", error)
"""
SOLVED = "04_exercises, solved"


@pytest.fixture(scope="module", params=["tiny", "whole"])
def executed(request, model_folder, tmp_path_factory):
    """All of them, two at a time."""
    # A notebook's kernel inherits this: two kernels on two cores would fight for threads else.
    environment = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

    def execute(title):
        folder = tmp_path_factory.mktemp("run")  # what it writes goes there; what it reads is there
        (folder / "results").symlink_to(HERE / "results")
        name, solved = title.partition(",")[0], title == SOLVED
        last = TRY.format(answers=[*ANSWERS, *RIGHT]) if solved else None
        tiny = {"MODEL": str(model_folder), **TINY, **SMALL[name]}
        values = tiny if request.param == "tiny" else None
        return run(name, values, "plotly_mimetype", folder, last, solved, environment)

    titles = (*NAMES, SOLVED)
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(titles, pool.map(execute, titles), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_it_runs_from_a_clean_kernel(name, executed):
    shown = counted(executed[name])
    assert all(found >= least for found, least in zip(shown, SHOWN[name], strict=True))
    streams = [o for o in outputs(executed[name]) if o.output_type == "stream"]
    assert not [o.text for o in streams if o.name == "stderr" and "Warning" in o.text]


def said(notebook):
    return "".join(o.text for o in outputs(notebook) if o.output_type == "stream")


@pytest.mark.slow
def test_exercises_tell_right_from_wrong(executed):
    untouched, solved = said(executed["04_exercises"]), said(executed[SOLVED])
    assert untouched.count("Not done yet") == 7
    assert "Right" not in untouched
    before, _, tried = solved.partition("TOLD ")
    assert len({line for line in before.splitlines() if line.startswith("Right")}) == 7
    told = re.findall(r"^TOLD .*$|^ACCEPTED .*$", f"TOLD {tried}", re.MULTILINE)
    assert len(told) == len(ANSWERS) + len(RIGHT)
    for line, (answer, expected) in zip(told, ANSWERS.items(), strict=False):
        assert re.search(expected, line), (answer, line)
    for line in told[len(ANSWERS) :]:
        assert line.startswith("ACCEPTED"), line


def test_solutions_are_hidden():
    """Also where the notebook is only looked at."""
    kept = nbformat.read(HERE / "04_exercises.ipynb", 4)
    source = "\n".join(cell.source for cell in kept.cells)
    assert source.count("<summary>Solution</summary>") == 7
    shown = re.sub(r"<details>.*?</details>", "", source, flags=re.DOTALL)
    assert "tm.melbo(" not in shown
    assert "idxmax" not in shown.replace('swept["kl"].idxmax()', "", 1)  # the check's own
    assert "Right" not in "".join(str(o) for o in outputs(kept))


@pytest.mark.parametrize("name", NAMES)
def test_what_is_kept_is_the_text_as_it_ran(name):
    text = jupytext.read(HERE / f"{name}.py")
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


def test_the_folder_has_no_other_notebooks():
    assert {path.stem for path in Path(HERE).glob("*.ipynb")} == {*NAMES}


@pytest.fixture(scope="module")
def lab(executed, tmp_path_factory):
    """JupyterLab on the notebooks as they ran, scripts included; gives its address."""
    folder = tmp_path_factory.mktemp("lab")
    for name in NAMES:
        nbformat.write(executed[name], folder / f"{name}.ipynb")
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
