"""Mistyped commands, and options in any place."""

from __future__ import annotations

import shutil

import pytest


def test_without_arguments_help_is_shown(dominie):
    ended = dominie()
    assert ended.status == 2
    assert "Train small language models" in ended.out + ended.err


@pytest.mark.parametrize(
    "arguments",
    [["run"], ["walk"], ["run", "r.yaml", "--rnus", "x"], ["run", "r.yaml", "--train.steps=1"]],
)
def test_a_mistyped_command_is_a_usage_error(work, dominie, arguments):
    ended = dominie(*arguments)
    assert ended.status == 2
    assert "Usage:" in ended.err
    assert "Traceback" not in ended.err
    if "--train.steps=1" in arguments:
        assert "without dashes: train.steps=VALUE" in ended.err


def test_options_in_any_place_and_names_with_spaces(work, dominie):
    odd = work / "ein Ordner für" / "ré cipe.yaml"
    odd.parent.mkdir()
    odd.write_text((work / "r.yaml").read_text().replace("d.jsonl", "dåta 1.jsonl"))
    shutil.copy(work / "d.jsonl", odd.parent / "dåta 1.jsonl")
    first = dominie("check", "--runs", "rüns 1", odd, f"stages.s.student={work / 'm'}")
    last = dominie("check", odd, f"stages.s.student={work / 'm'}", "--runs", "rüns 2")
    assert (first.status, last.status) == (0, 0), first.err + last.err
    assert (work / "rüns 1" / "small").is_dir()
    assert (work / "rüns 2" / "small").is_dir()


def test_debug_shows_the_traceback_in_any_place(work, dominie):
    for arguments in (["run", "no.yaml", "--debug"], ["--debug", "run", "no.yaml"]):
        ended = dominie(*arguments)
        assert ended.status == 2
        assert "Traceback" in ended.err
        assert "no such recipe" in ended.err
