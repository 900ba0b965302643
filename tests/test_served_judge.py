"""A real OpenAI-compatible server on the loopback, with the bundled model, started by the test."""

import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

import tl_melbo as tm
from tl_melbo.errors import NoAnswer
from tl_melbo.evaluation._dose import number_in
from tl_melbo.model.cache import cache_folder, is_whole

pytestmark = pytest.mark.slow

PATIENCE = 300.0
# Within the reach of so small a model, and the order of the answers is known.
QUESTION = "Tom has {n} apples. How many apples does Tom have?"
APPLES = [7, 2, 9, 4]


@pytest.fixture(scope="module")
def served(model, tmp_path_factory):
    """The address of `transformers serve`, and the name of the bundled model there."""
    for library in ("openai", "fastapi", "uvicorn"):
        pytest.importorskip(library)
    folder = next(path for path in sorted(cache_folder().iterdir()) if is_whole(path))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [Path(sys.executable).parent / "transformers", "serve", folder, "--host", "127.0.0.1"]
    command += ["--port", str(port), "--device", "cpu", "--dtype", "float32"]
    log = (tmp_path_factory.mktemp("serve") / "log.txt").open("w+")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen([*map(str, command)], stdout=log, stderr=log, env=environment)
    try:
        ends = time.monotonic() + PATIENCE
        while True:
            assert process.poll() is None, Path(log.name).read_text()
            assert time.monotonic() < ends, Path(log.name).read_text()
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                    break
            except OSError:
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1", str(folder), process
    finally:
        process.kill()
        process.wait()
        log.close()


def test_a_served_model_judges_as_a_local_one(model, served, tmp_path):
    url, name, process = served
    local = tm.judges.local(model, max_new_tokens=8)
    options = {"api_key_env": None, "max_tokens": 8, "timeout": PATIENCE}
    behind = tm.judges.openai_compatible(url, name, cache=tmp_path, **options)
    asked = [QUESTION.format(n=n) for n in APPLES]
    answers = tm.judges.ask(behind, asked)
    assert answers == tm.judges.ask(local, asked)
    # Both rank what is known as it is known.
    assert [number_in(answer) for answer in answers] == APPLES
    assert behind.calls == len(asked)
    assert behind.tokens >= 20 * len(asked)
    # The server dies; what was answered is there, and what was not is told.
    process.kill()
    process.wait()
    again = tm.judges.openai_compatible(url, name, cache=tmp_path, retries=0, **options)
    assert tm.judges.ask(again, asked) == answers
    with pytest.raises(NoAnswer, match="cannot be reached"):
        again("Another question?")
