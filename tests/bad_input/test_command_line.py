"""Mistyped commands, and options wherever they stand."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys

import pytest
import typer

from dominie.cli import app
from dominie.cli import commands as before
from dominie.cli.help import EXAMPLES, words
from dominie.workflows.init import TEMPLATES

COMMANDS = typer.main.get_command(app).commands


@pytest.mark.parametrize("verb", EXAMPLES)
def test_help_fits_80_columns_and_shows_examples_whole(dominie, monkeypatch, verb):
    monkeypatch.setenv("COLUMNS", "80")
    said = dominie(verb, "--help")
    assert said.status == 0
    lines = [line.strip() for line in said.out.splitlines()]
    assert all(len(line) <= 80 for line in said.out.splitlines())
    assert "Usage: dominie " + verb in said.out
    for command, _ in EXAMPLES[verb]:
        assert any(line.startswith(command) for line in lines), command


def test_every_verb_has_examples_and_each_is_a_command_that_can_be_typed():
    assert list(EXAMPLES) == list(COMMANDS)
    for verb, shown in EXAMPLES.items():
        for command, _ in shown:
            typed, *arguments = words(command)
            assert typed == verb
            COMMANDS[verb].make_context(verb, arguments)  # raises where it is not


def completed(line: str) -> list[str]:
    asked = {"_DOMINIE_COMPLETE": "complete_bash", "COMP_WORDS": line}
    environment = {**os.environ, **asked, "COMP_CWORD": str(len(shlex.split(line)) - 1)}
    command = [sys.executable, "-m", "dominie"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    return done.stdout.split()


def test_the_shell_completes_verbs_options_and_templates():
    assert completed("dominie ch") == ["check", "chat"]
    assert completed("dominie run --re") == ["--reuse"]
    assert completed("dominie init x --template kd") == ["kd", "kd-dae"]
    assert before._templates() == list(TEMPLATES)


def test_the_command_line_is_there_at_once():
    code = (
        "import os, sys, dominie.cli as cli\n"
        "heavy = {'torch', 'transformers', 'pydantic', 'numpy', 'datasets'} & set(sys.modules)\n"
        "print(heavy or sum(os.times()[:2]))\n"
    )
    command = [sys.executable, "-c", code]
    took = [subprocess.run(command, capture_output=True, text=True).stdout for _ in range(3)]
    assert min(map(float, took)) < 0.5  # seconds of the processor's: 0.2 on an idle machine


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
