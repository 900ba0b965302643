"""A reader's notes are an untrusted file: checked, and read back as they were."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import tl_melbo as tm
from tl_melbo import report

ENTRY = {"star": True, "name": "a", "note": "b"}


def test_notes_are_read_back(tmp_path: Path) -> None:
    path = tmp_path / "notes.json"
    behaviour = {**ENTRY, "members": ["4", "7-"], "merged": [["2p2"]]}
    notes = {"version": 1, "vectors": {"4": ENTRY, "4-": {"star": True}}, "behaviours": [behaviour]}
    path.write_text(json.dumps(notes), encoding="utf-8")
    read = report.read_notes(path)
    assert read["vectors"] == {"4": ENTRY, "4-": {"star": True, "name": "", "note": ""}}
    assert read["behaviours"] == [behaviour]


def test_half_a_character_is_made_visible(tmp_path: Path) -> None:
    path = tmp_path / "notes.json"
    path.write_text(r'{"version": 1, "vectors": {"4": {"name": "\ud83d", "note": "\u202e"}}}')
    read = report.read_notes(path)
    assert read["vectors"]["4"] == {"star": False, "name": "\ufffd", "note": "[U+202E]"}
    # However long it is then, it can be read again.
    long = {"version": 1, "vectors": {"4": {"name": "\u202e" * 200}}}
    path.write_text(json.dumps(long))
    path.write_text(json.dumps(report.read_notes(path), ensure_ascii=False), encoding="utf-8")
    assert report.read_notes(path)["vectors"]["4"]["name"] == ("[U+202E]" * 25)


@pytest.mark.parametrize(
    ("notes", "message"),
    [
        ([], "not a mapping"),
        ({"version": 2}, "version 2, expected 1"),
        ({"version": 1, "more": 1}, "unknown entries"),
        ({"version": 1, "vectors": {"<b>": ENTRY}}, r"unknown entries \['<b>'\]"),
        ({"version": 1, "vectors": {"4": {"star": 1}}}, "star=1, expected true"),
        ({"version": 1, "vectors": {"4": {"name": "x" * 201}}}, "at most 200 characters"),
        ({"version": 1, "vectors": {"4": {"note": 3}}}, "note is not a text"),
        ({"version": 1, "vectors": [1]}, "not a mapping"),
        ({"version": 1, "behaviours": {}}, "not a list"),
        ({"version": 1, "behaviours": [{"members": "4"}]}, "not a list"),
        ({"version": 1, "behaviours": [{"members": ["4/"]}]}, "not vectors' numbers"),
        ({"version": 1, "behaviours": [{**ENTRY, "members": [], "merged": [4]}]}, "not a list"),
    ],
)
def test_other_notes_are_refused(notes: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "notes.json"
    path.write_text(json.dumps(notes), encoding="utf-8")
    with pytest.raises(tm.errors.Damaged, match=message) as caught:
        report.read_notes(path)
    assert caught.value.path == path


def test_files_that_are_no_notes_are_refused(tiny_llama: torch.nn.Module, tmp_path: Path) -> None:
    found = tm.SteeringVectors.from_tensor(torch.eye(2, 32), source_layer=2)
    path = tmp_path / "notes.json"
    for content in (b"{", b"\xff", b"[" * 100_000, b" " * 5_000_001):
        path.write_bytes(content)
        with pytest.raises(tm.errors.Damaged, match=r"notes\.json"):
            report.read_notes(path)
        with pytest.raises(tm.errors.Damaged):
            report.write(tmp_path / "p.html", tiny_llama, found, notes=path)
    with pytest.raises(FileNotFoundError):
        report.read_notes(tmp_path / "none.json")
    with pytest.raises(ValueError, match="version"):
        report.write(tmp_path / "p.html", tiny_llama, found, notes={"version": 7})
    assert not (tmp_path / "p.html").exists()
