"""Judges: what they are asked, what of their answers is believed, and where keys are not."""

import copy
import csv
import json
import logging
import pickle
import time

import pandas as pd
import pytest

import tl_melbo as tm
from tests.judge_server import running
from tl_melbo.errors import Damaged, NoAnswer, Unanswered

KEY = "sk-secret-0123456789"


@pytest.fixture
def server():
    with running() as each:
        yield each


@pytest.fixture
def judge_of(server, monkeypatch):
    pytest.importorskip("openai")
    monkeypatch.setenv("JUDGE_KEY", KEY)

    def make(**options):
        options = {"timeout": 2.0, "retries": 0, "api_key_env": "JUDGE_KEY", **options}
        return tm.judges.openai_compatible(server.url, "tiny", **options)

    return make


def test_a_server_is_asked_and_counted(server, judge_of):
    server.answer = lambda text: f" {text[::-1]}\n"
    judge = judge_of(max_tokens=9, options={"top_k": 1, "temperature": None})
    assert [judge("abc"), judge("de")] == ["cba", "ed"]
    assert (judge.calls, judge.tokens) == (2, 14)
    assert server.asked[0] == {
        "model": "tiny",
        "max_tokens": 9,
        "top_k": 1,
        "messages": [{"role": "user", "content": "abc"}],
    }
    assert server.headers_seen[0]["Authorization"] == f"Bearer {KEY}"


def chain(error):
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def echo(handler):
    """What some servers do with a key that they do not know."""
    heard = handler.headers["Authorization"]
    body = json.dumps({"error": {"message": f"unknown key: {heard}"}})
    handler.send(body, 401, X_Heard=heard)


def test_the_key_is_nowhere(server, judge_of, tmp_path, caplog, capfd):
    server.answer = lambda text: f"You sent {KEY}."
    judge = judge_of(cache=tmp_path)
    with (
        caplog.at_level(logging.DEBUG, logger="openai"),
        caplog.at_level(logging.DEBUG, "tl_melbo"),
    ):
        assert judge("Hi!") == "You sent [key]."
        server.behave = echo
        with pytest.raises(NoAnswer, match=r"status 401: 'Error code: 401.*\[key\]") as caught:
            judge("Hi again!")
        server.behave = lambda handler: handler.send(f'["{"x" * 30}", "{KEY}"]')
        with pytest.raises(NoAnswer, match=r"no choices\[0\]") as lied:
            judge("Hi again!")
    for error in (*chain(caught.value), *chain(lied.value)):
        assert KEY not in f"{error!r} {error} {vars(error)}"
    told = [repr(judge), str(judge), caplog.text, *capfd.readouterr()]
    told += [path.read_text() for path in tmp_path.rglob("*") if path.is_file()]
    told += [pickle.dumps(judge).decode("latin-1"), repr(vars(copy.copy(judge)))]
    assert not any(KEY in text or KEY[4:] in text for text in told)
    assert pickle.loads(pickle.dumps(judge))("Hi!") == "You sent [key]."


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "api_key_env='JUDGE_KEY': the environment has no such variable"),
        (" ", "api_key_env='JUDGE_KEY': the environment has no such variable"),
        (f"{KEY}\nX: y", "api_key_env='JUDGE_KEY': what it holds cannot be a key"),
    ],
)
def test_a_key_that_is_missing_is_named(judge_of, monkeypatch, value, message):
    if value is None:
        monkeypatch.delenv("JUDGE_KEY")
    else:
        monkeypatch.setenv("JUDGE_KEY", value)
    with pytest.raises(ValueError, match=message) as caught:
        judge_of()
    assert KEY not in str(caught.value)


def cut_off(handler):
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"choices": [')
    handler.close_connection = True


@pytest.mark.parametrize(
    ("behave", "message"),
    [
        (lambda h: time.sleep(1), r"no whole answer in timeout=0.3 s, 0 retries"),
        (lambda h: h.endless(b" ", 0.05), r"no whole answer in timeout=0.3 s"),
        (lambda h: h.endless(b"x" * 65_536), r"more than 1,048,576 bytes"),
        (lambda h: h.send(b"x" * 2**21), r"more than 1,048,576 bytes"),
        (lambda h: h.send(b"\x1f\x8b", Content_Encoding="gzip"), r"packed as 'gzip'"),
        (cut_off, r"broke off \(RemoteProtocolError\)"),
        (lambda h: h.send("<html>"), r"the server sent no JSON: '<html>'"),
        (lambda h: h.send("[" * 200_000), r"the server sent no JSON"),
        (lambda h: h.send("\x00\x1b[2J"), r"the server sent no JSON: '␀␛\[2J'"),
        (lambda h: h.send("[]"), r"no choices\[0\].message.content"),
        (lambda h: h.send('{"choices": []}'), r"no choices\[0\].message.content"),
        (lambda h: h.send('{"choices": "none"}'), r"no choices\[0\].message.content"),
        (lambda h: h.reply({"a": 1}), r"a dict for a text"),
        (lambda h: h.reply(3), r"a int for a text"),
        (lambda h: h.reply("x" * 20_000), r"20,000 characters, at most 640"),
        (lambda h: h.send("{}", 404), r"refused with status 404"),
        (lambda h: h.send("", 307, Location="http://127.0.0.1:9/"), r"refused with status 307"),
    ],
)
def test_servers_that_fail_lie_and_flood_are_told(server, judge_of, behave, message, tmp_path):
    server.behave = behave
    judge = judge_of(timeout=0.3 if "timeout" in message else 5.0, max_tokens=10, cache=tmp_path)
    with pytest.raises(NoAnswer, match=message) as caught:
        judge("Is it?")
    assert server.url in str(caught.value)
    assert (judge.calls, judge.tokens) == (0, 0)
    assert not [*tmp_path.iterdir()]


def test_strange_but_harmless_answers_are_cleaned(server, judge_of):
    server.behave = lambda handler: handler.reply("a\x1b[2J\ud800 ", total_tokens="many")
    judge = judge_of()
    assert judge("Hi!") == "a␛[2J\ufffd"
    server.behave = lambda handler: handler.reply(None, total_tokens=-3)
    assert judge("Hi!") == ""
    assert (judge.calls, judge.tokens) == (2, 0)


def test_a_server_that_is_down_and_one_that_comes_back(server, judge_of):
    failures = [503]

    def behave(handler):
        if failures:
            handler.send("{}", failures.pop(), retry_after_ms="10")
        else:
            handler.reply("now")

    server.behave = behave
    assert judge_of(retries=1)("Hi!") == "now"
    assert len(server.asked) == 2
    judge = judge_of()
    server.shutdown()
    server.server_close()
    with pytest.raises(NoAnswer, match="cannot be reached"):
        judge("Hi!")


def test_what_was_answered_is_kept(server, judge_of, tmp_path):
    server.answer = lambda text: text.upper()

    def die(handler):
        if len(server.asked) > 2:
            handler.close_connection = True
        else:
            handler.reply(server.answer(handler.question))

    server.behave = die
    with pytest.raises(NoAnswer, match="broke off"):
        tm.judges.ask(judge_of(cache=tmp_path), ["a", "b", "c", "d"])
    server.behave = None
    server.asked.clear()
    # A killed process may leave the beginning of a file that was never an answer.
    (tmp_path / f".{'0' * 64}.json.{'a' * 32}.partial").write_text('{"answ')
    judge = judge_of(cache=tmp_path)
    assert tm.judges.ask(judge, ["a", "b", "c", "d", "a"]) == ["A", "B", "C", "D", "A"]
    assert [each["messages"][0]["content"] for each in server.asked] == ["c", "d"]
    assert judge.calls == 2
    # Another setting is another question.
    judge_of(cache=tmp_path, max_tokens=5)("a")
    assert len(server.asked) == 3


@pytest.mark.parametrize("damage", ["", "{", '"a"', '{"answer": 3, "sha256": ""}', "A→B"])
def test_damaged_answers_are_told_and_asked_again(server, judge_of, tmp_path, damage):
    server.answer = lambda text: "A"
    judge = judge_of(cache=tmp_path)
    judge("Hi!")
    (entry,) = tmp_path.iterdir()
    entry.write_text(entry.read_text().replace('"A"', '"B"') if damage == "A→B" else damage)
    with pytest.warns(UserWarning, match="damaged; the question is asked again"):
        assert judge("Hi!") == "A"
    assert judge("Hi!") == "A"
    assert judge.calls == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"base_url": f"http://me:{KEY}@host/v1"}, "base_url: holds a user"),
        (
            {"base_url": f"http://host/v1?key={KEY}"},
            "base_url: holds a user, a password or a query",
        ),
        ({"base_url": "host:80"}, "base_url='host:80': not an address"),
        ({"base_url": "http://host:x/v1"}, "not an address"),
        ({"timeout": 0.0}, "timeout=0.0: a positive"),
        ({"retries": -1}, "retries=-1: at least 0"),
        ({"max_tokens": 0}, "max_tokens=0: at least 1"),
        ({"model": " "}, "model=' '"),
        ({"options": {"stream": True}}, r"options: \['stream'\] are set by the judge"),
        ({"options": {"stop": {1}}}, "options: Object of type set"),
    ],
)
def test_bad_arguments_are_named(monkeypatch, arguments, message):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with pytest.raises(ValueError, match=message) as caught:
        tm.judges.openai_compatible(**{"base_url": "http://host/v1", "model": "m", **arguments})
    assert KEY not in str(caught.value)


def test_openai_is_asked_for_by_name(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "openai", None)
    with pytest.raises(
        ModuleNotFoundError,
        match=r"needs openai; pip install 'tl_melbo\[judges\]', or, in a clone, pip install -e",
    ):
        tm.judges.openai_compatible("http://host/v1", "m")


def test_a_local_model_answers_greedily_in_its_template(tiny_llama, unchanged):
    unchanged(tiny_llama)
    judge = tm.judges.local(tiny_llama, max_new_tokens=5)
    greedy = tm.generate(tiny_llama, "Hi!", max_new_tokens=5, chat=True)["completion"][0]
    assert judge("Hi!") == greedy
    with pytest.raises(ValueError, match="has room for"):
        tm.judges.local(tiny_llama, max_new_tokens=250)("Hi!")


def fill_in(path, answer, **options):
    table = pd.read_csv(path, dtype=str, keep_default_na=False)
    table["answer"] = [answer(text) for text in table["question"]]
    table.to_csv(path, index=False, **options)


@pytest.mark.parametrize("options", [{}, {"sep": ";", "encoding": "utf-8-sig"}, {"sep": "\t"}])
def test_a_sheet_is_filled_in_and_read_back(tmp_path, options):
    judge = tm.judges.sheet(tmp_path / "sheet.csv")
    questions = ['Which?\nA: one, two\nB: "three"', "=cmd()|'x'!A1", "Ω?"]
    with pytest.raises(
        Unanswered, match=r"3 of 3 questions have no answer yet, numbers \[1, 2, 3\]"
    ):
        tm.judges.ask(judge, [*questions, questions[0]])
    with (tmp_path / "sheet.csv").open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["number", "id", "question", "answer"]
    assert [row[2] for row in rows[1:]] == [questions[0], "'" + questions[1], questions[2]]
    fill_in(judge.path, lambda text: "" if "Ω" in text else f" {text[0]} ", **options)
    with pytest.raises(Unanswered, match=r"1 of 3 .*numbers \[3\]") as caught:
        tm.judges.ask(judge, questions)
    assert (caught.value.path, caught.value.rows) == (judge.path, [3])
    assert tm.judges.ask(judge, questions[:2]) == ["W", "'"]
    # A new question keeps the old answers.
    with pytest.raises(Unanswered, match=r"1 of 1 .*numbers \[4\]"):
        judge("Another?")
    assert judge(questions[0]) == "W"


def test_sheets_that_were_damaged_are_refused(tmp_path):
    judge = tm.judges.sheet(tmp_path / "sheet.csv")
    with pytest.raises(Unanswered):
        judge("Über?")
    text = judge.path.read_text(encoding="utf-8-sig")
    for content, message in (
        (text.encode("cp1252"), "not in UTF-8"),
        (b"a,b\n1,2\n", r"lacks the columns \['number', 'id', 'question', 'answer'\]"),
        (b"", "not a table"),
        ((text + text.splitlines()[1] + "\n").encode(), r"questions \[1\] are there twice"),
    ):
        judge.path.write_bytes(content)
        with pytest.raises(Damaged, match=message):
            judge("Über?")
        assert judge.path.read_bytes() == content
    with pytest.raises(ValueError, match="a cell of a spreadsheet holds at most"):
        tm.judges.sheet(tmp_path / "other.csv")("x" * 40_000)


@pytest.mark.parametrize(
    ("judge", "error", "message"),
    [
        ("gpt", TypeError, "judge: got str, expected a function"),
        (lambda text: 3, TypeError, "answer 0 is of type int, expected a text"),
        (lambda text: "x" * 30_000, NoAnswer, "answer 0 has 30,000 characters"),
    ],
)
def test_what_is_no_judge_is_named(judge, error, message):
    with pytest.raises(error, match=message):
        tm.judges.ask(judge, ["Hi!"])


def test_a_model_is_no_judge_yet(tiny_llama):
    with pytest.raises(TypeError, match=r"judge: got a model.*tm.judges.local\(model\)"):
        tm.judges.ask(tiny_llama, ["Hi!"])
