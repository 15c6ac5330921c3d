"""stdout is one JSON object if asked for, and free of what libraries print."""

from __future__ import annotations

import logging
import subprocess
import sys

from dominie.cli.output import display_for, only_json


def test_nothing_but_json_is_printed_on_stdout(capfd):
    compiler = [sys.executable, "-c", "print('a compiler')"]
    with only_json(True):
        print("a library")
        subprocess.run(compiler, check=True)
    print("{}")
    printed = capfd.readouterr()
    assert printed.out == "{}\n"
    assert printed.err.splitlines() == ["a library", "a compiler"]
    with only_json(False):
        subprocess.run(compiler, check=True)
    assert capfd.readouterr().out == "a compiler\n"


def test_deepspeed_logs_errors_only(capsys):
    logger = logging.getLogger("DeepSpeed")
    display_for(as_json=False)
    messages: list[str] = []

    class Recorder(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    recorder = Recorder()
    logger.addHandler(recorder)
    level = logger.level
    logger.setLevel(logging.WARNING)  # as it does itself when it is imported
    try:
        logger.warning("Setting accelerator to CPU")
        logger.error("out of memory")
    finally:
        logger.removeHandler(recorder)
        logger.setLevel(level)
    assert messages == ["out of memory"]
