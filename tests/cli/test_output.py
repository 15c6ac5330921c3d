"""Where words go: stdout is one JSON object where asked for, and free of libraries' worries."""

from __future__ import annotations

import logging
import subprocess
import sys

from dominie.cli.output import only_json, shown_on


def test_where_stdout_is_for_json_nothing_else_gets_there(capfd):
    say = [sys.executable, "-c", "print('a compiler')"]
    with only_json(True):
        print("a library")
        subprocess.run(say, check=True)
    print("{}")
    said = capfd.readouterr()
    assert said.out == "{}\n"
    assert said.err.splitlines() == ["a library", "a compiler"]
    with only_json(False):
        subprocess.run(say, check=True)
    assert capfd.readouterr().out == "a compiler\n"


def test_deepspeed_tells_errors_alone(capsys):
    logger = logging.getLogger("DeepSpeed")
    shown_on(as_json=False)
    heard: list[str] = []

    class Ear(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            heard.append(record.getMessage())

    ear = Ear()
    logger.addHandler(ear)
    level = logger.level
    logger.setLevel(logging.WARNING)  # as it does itself when it is imported
    try:
        logger.warning("Setting accelerator to CPU")
        logger.error("out of memory")
    finally:
        logger.removeHandler(ear)
        logger.setLevel(level)
    assert heard == ["out of memory"]
