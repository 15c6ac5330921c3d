"""Help that fits a terminal, examples that can be typed, and completion as bash asks for it."""

from __future__ import annotations

import shlex
import sys

import pytest
import typer
from typer.testing import CliRunner

from dominie.cli import app, main
from dominie.cli.commands import TEMPLATES as OFFERED
from dominie.cli.output import EXAMPLES
from dominie.workflows.init import TEMPLATES

COMMANDS = typer.main.get_command(app).commands


@pytest.mark.parametrize("verb", EXAMPLES)
def test_help_fits_80_columns_and_shows_examples_whole(verb):
    shown = CliRunner().invoke(app, [verb, "--help"], prog_name="dominie", env={"COLUMNS": "80"})
    assert shown.exit_code == 0
    assert all(len(line) <= 80 for line in shown.output.splitlines())
    assert "Usage: dominie " + verb in shown.output
    lines = [line.strip() for line in shown.output.splitlines()]
    for command, _ in EXAMPLES[verb]:
        assert any(line.startswith(command) for line in lines), command


def test_every_verb_has_examples_and_each_is_a_command_that_can_be_typed():
    assert list(EXAMPLES) == list(COMMANDS)
    for verb, shown in EXAMPLES.items():
        for example, _ in shown:
            words = shlex.split(example)
            start = words.index("dominie") + 1
            assert words[start] == verb
            COMMANDS[verb].make_context(verb, words[start + 1 :])  # raises if it cannot be parsed


RECIPE = """
data: {general: {path: g.jsonl, test_fraction: 0.1}}
train: {epochs: 3}
stages:
  align: {student: org/small, data: {general: 1.0}, train: {epochs: 2, batch: 8}}
"""


@pytest.fixture
def offered(tmp_path, monkeypatch, capsys):
    """What is offered for the last word of a line, in a folder with recipes and two runs."""
    (tmp_path / "shop").mkdir()
    (tmp_path / "shop" / "recipe.yaml").write_text(RECIPE)
    (tmp_path / "mine.yaml").write_text(RECIPE)
    (tmp_path / "broken.yaml").write_text("stages: [")
    for run in ("runs/mine", "runs/other", "elsewhere/third"):
        for stage in ("distill", "align"):
            (tmp_path / run / stage / "model").mkdir(parents=True)
        (tmp_path / run / "results.json").write_text("{}")
    (tmp_path / "runs" / "cache").mkdir()
    monkeypatch.chdir(tmp_path)

    def complete(*words: str) -> list[str]:
        monkeypatch.setenv("_DOMINIE_COMPLETE", "complete_bash")
        monkeypatch.setenv("COMP_WORDS", "\n".join(["dominie", *words]))
        monkeypatch.setenv("COMP_CWORD", str(len(words)))
        monkeypatch.setattr(sys, "argv", ["dominie"])
        with pytest.raises(SystemExit) as left:
            main()
        assert not left.value.code
        captured = capsys.readouterr()
        assert captured.err == ""
        return sorted(captured.out.split())

    return complete


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["ch"], ["chat", "check"]),
        (["run", "--re"], ["--reuse"]),
        (["run", "mine.yaml", "--engine", "f"], ["fsdp2"]),
        (["init", "x", "--template", "kd"], ["kd", "kd-dae"]),
        (["run", "mi"], []),  # files are the shell's
        (["run", "mine.yaml", "stages.align.train.ep"], ["stages.align.train.epochs="]),
        (["plan", "mine.yaml", "d"], ["data.general.path=", "data.general.test_fraction="]),
        (["check", "shop", "train."], ["train.epochs="]),
        (["sweep", "mine.yaml", "--over", "train.ep"], ["train.epochs="]),
        (["run", "broken.yaml", "stages.a"], []),
        (["run", "none.yaml", "stages.a"], []),
        (["report", ""], ["mine", "other"]),
        (["report", "--runs", "elsewhere", ""], ["third"]),
        (["report", "none"], []),
        (["compare", "mine", "ot"], ["other"]),
        (["chat", "mi"], ["mine", "mine:align", "mine:distill"]),
    ],
)  # fmt: skip
def test_bash_is_offered(offered, words, expected):
    assert offered(*words) == expected


def test_all_templates_are_offered():
    assert list(TEMPLATES) == OFFERED
