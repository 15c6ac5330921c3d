"""Mistyped commands, and options wherever they stand."""

from __future__ import annotations

import shutil

import pytest


@pytest.mark.parametrize("verb", ["run", "evaluate", "report", "check", "plan"])
def test_help_fits_80_columns(dominie, monkeypatch, verb):
    monkeypatch.setenv("COLUMNS", "80")
    said = dominie(verb, "--help")
    assert said.status == 0
    assert all(len(line) <= 80 for line in said.out.splitlines())
    assert "Usage: dominie " + verb in said.out


def test_without_arguments_help_is_shown(dominie):
    said = dominie()
    assert said.status == 2
    assert "Train small language models" in said.out + said.err


@pytest.mark.parametrize(
    "arguments",
    [["run"], ["walk"], ["run", "r.yaml", "--rnus", "x"], ["run", "r.yaml", "--train.steps=1"]],
)
def test_a_mistyped_command_is_a_usage_error(work, dominie, arguments):
    said = dominie(*arguments)
    assert said.status == 2
    assert "Usage:" in said.err
    assert "Traceback" not in said.err
    if "--train.steps=1" in arguments:
        assert "without dashes: train.steps=VALUE" in said.err


def test_options_may_stand_anywhere_and_names_may_hold_spaces(work, dominie):
    odd = work / "ein Ordner für" / "ré cipe.yaml"
    odd.parent.mkdir()
    odd.write_text((work / "r.yaml").read_text().replace("d.jsonl", "dåta 1.jsonl"))
    shutil.copy(work / "d.jsonl", odd.parent / "dåta 1.jsonl")
    first = dominie("check", "--runs", "rüns 1", odd, f"stages.s.student={work / 'm'}")
    last = dominie("check", odd, f"stages.s.student={work / 'm'}", "--runs", "rüns 2")
    assert (first.status, last.status) == (0, 0), first.err + last.err
    assert (work / "rüns 1" / "small").is_dir()
    assert (work / "rüns 2" / "small").is_dir()


def test_debug_shows_the_traceback_wherever_it_stands(work, dominie):
    for arguments in (["run", "no.yaml", "--debug"], ["--debug", "run", "no.yaml"]):
        said = dominie(*arguments)
        assert said.status == 2
        assert "Traceback" in said.err
        assert "no such recipe" in said.err
