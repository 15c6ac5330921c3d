"""Everything a user can get wrong ends in one message and an exit status, with nothing lost."""

from __future__ import annotations

import json
import shutil
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from dominie import cli
from dominie.toyworld.toy_models import save_model

RECIPE = """
name: small
data: {d: {path: d.jsonl, test_fraction: 0.2}}
train: {learning_rate: 1e-3, steps: 2, batch: 4, max_length: 64}
stages:
  s: {student: m, data: {d: 1.0}, loss: {next_token: 1.0}}
evaluate:
  models: {s: s}
  tasks: {t: {source: d}}
"""
ROWS = [
    {
        "messages": [
            {"role": "user", "content": f"copy {i} {7 * i}"},
            {"role": "assistant", "content": "red"},
        ],
        "family": "colour",
    }
    for i in range(40)
]


class Said(NamedTuple):
    status: int
    out: str
    err: str


@pytest.fixture(scope="session")
def template(tmp_path_factory) -> Path:
    """A recipe, its data and a model's folder."""
    folder = tmp_path_factory.mktemp("template")
    (folder / "r.yaml").write_text(RECIPE)
    (folder / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    save_model("student", folder / "m", seed=0)
    return folder


@pytest.fixture
def work(template, tmp_path, monkeypatch) -> Path:
    """A copy of the template, and the current folder."""
    folder = shutil.copytree(template, tmp_path / "work")
    monkeypatch.chdir(folder)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return folder


@pytest.fixture
def dominie(monkeypatch, capsys) -> Iterator[Callable[..., Said]]:
    """The command line in this process."""
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}

    def run(*arguments: object) -> Said:
        monkeypatch.setattr(sys, "argv", ["dominie", *map(str, arguments)])
        with warnings.catch_warnings(), pytest.raises(SystemExit) as left:
            cli.main()
        captured = capsys.readouterr()
        return Said(int(left.value.code or 0), captured.out, captured.err)

    yield run
    for signum, handler in handlers.items():
        signal.signal(signum, handler)


@pytest.fixture
def refused() -> Callable[..., None]:
    """Checks that a command was refused in one message."""

    def check(said: tuple[int, str, str], *words: str, status: int = 2) -> None:
        said = Said(*said)
        assert said.status == status, said
        assert f"\n{said.err}".count("\nerror: ") == 1, said.err
        assert "Traceback" not in said.out + said.err
        assert "report this" not in said.err, "an error that nobody put into words"
        for word in words:
            assert word in said.err, said.err

    return check
