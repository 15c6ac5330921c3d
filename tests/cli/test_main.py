"""The command line imports nothing heavy, and makes one message of every error."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from dominie.cli import main as entry_point
from dominie.core.distributed import EXIT_PEER_LOST
from dominie.core.errors import InputError, RunError

#: Slow to import, and needed by none of these.
HEAVY = (
    "accelerate",
    "datasets",
    "httpx2",
    "huggingface_hub",
    "jinja2",
    "numpy",
    "openai",
    "peft",
    "pyarrow",
    "pydantic",
    "safetensors",
    "tokenizers",
    "torch",
    "transformers",
)


def imported(code: str, *arguments: str) -> tuple[set[str], float]:
    """The heavy modules that a program imports, and its processor time in seconds."""
    report = (
        "import atexit, os, sys\n"
        "atexit.register(lambda: print(*sys.modules, sum(os.times()[:2]), file=sys.stderr))\n"
    )
    command = [sys.executable, "-c", report + code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    *modules, seconds = done.stderr.split()
    return {name.partition(".")[0] for name in modules} & set(HEAVY), float(seconds)


def test_import_dominie_imports_nothing_heavy():
    heavy, _ = imported("import dominie")
    assert heavy == set()
    light = "import dominie.core.io, dominie.core.display, dominie.core.run_reader"
    assert imported(light)[0] == set()


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["--version"]])
def test_help_imports_nothing_heavy_and_is_quick(arguments):
    for _ in range(3):  # the machine may be busy
        heavy, seconds = imported("import sys, dominie.cli\ndominie.cli.main()", *arguments)
        if seconds < 0.8:  # 0.3 on an idle machine
            break
    assert heavy - {"pydantic"} == set()  # typer itself parses arguments with it
    assert seconds < 0.8


LOST = RuntimeError("[../gloo/transport/tcp/pair.cc:534] Connection closed by peer")


def wrapped(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.fixture
def ended(monkeypatch, capsys):
    """Runs the entry point over an error: the exit status and what was printed."""
    module = sys.modules["dominie.cli.main"]
    keep = SimpleNamespace(SIGINT=2, SIGTERM=15, signal=lambda *_: None)
    monkeypatch.setattr(module, "signal", keep)  # the handlers of the tests stay
    monkeypatch.setattr(os, "_exit", sys.exit)

    def run(error: BaseException, *arguments: str) -> tuple[int, str]:
        def fail(**_: object) -> None:
            raise error

        monkeypatch.setattr(module, "app", fail)
        monkeypatch.setattr(sys, "argv", ["dominie", *arguments])
        with pytest.raises(SystemExit) as left:
            entry_point()
        return left.value.code, capsys.readouterr().err

    return run


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (InputError("no such key", where="r.yaml"), 2, "error: r.yaml: no such key\n"),
        (RunError("the loss is not finite"), 1, "error: the loss is not finite\n"),
        (OSError(28, "No space left on device", "a.bin"), 1, "a.bin: No space left on device"),
        (OSError(28, "No space left on device"), 1, "make room"),
        (type("OutOfMemoryError", (RuntimeError,), {})("CUDA"), 1, "lower train.micro_batch"),
        (ValueError("odd"), 1, "error: ValueError: odd\n  do        run again with --debug"),
    ],
)
def test_every_error_becomes_one_message_and_a_status(ended, error, status, message):
    code, printed = ended(error)
    assert code == status
    assert message in printed
    assert printed.count("error: ") == 1
    assert "Traceback" not in printed
    assert "Traceback" in ended(error, "run", "--debug")[1]


@pytest.mark.parametrize("error", [LOST, wrapped(InputError("cannot save"), LOST)])
def test_a_rank_that_lost_another_exits_silently(ended, monkeypatch, error):
    assert ended(error)[0] != EXIT_PEER_LOST  # a single process has none to lose
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert ended(error) == (EXIT_PEER_LOST, "")


def test_ranks_without_our_launcher_print_one_error(ended, monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, printed in (("1", "error: no data\n"), ("0", "")):
        (tmp_path / rank).mkdir()
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / rank / "error.json"))
        assert ended(InputError("no data")) == (2, printed)
