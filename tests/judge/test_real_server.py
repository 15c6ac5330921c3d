"""A real OpenAI-compatible server, `transformers serve`, answering and judging from end to end."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from dominie.generation.reply_log import read_reply
from dominie.toyworld.toy_models import save_model

from test_judged_run import mt_bench_files, run_folder, write_recipe  # isort: skip
from tiny_judge import LETTERS, RATINGS, save_tiny_judge  # isort: skip

pytestmark = [pytest.mark.full, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """The URL of a server, and the folder of the models it serves."""
    pytest.importorskip("uvicorn", reason="pip install 'transformers[serving]'")
    pytest.importorskip("fastapi", reason="pip install 'transformers[serving]'")
    folder = tmp_path_factory.mktemp("served")
    save_tiny_judge(folder / "rates", RATINGS)
    save_tiny_judge(folder / "compares", LETTERS)
    save_model("student", folder / "student", seed=0)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = "import sys; from transformers.cli.transformers import main; sys.exit(main())"
    options = ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu", "--dtype", "float32"]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", code, "serve", *options],
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        )
    try:
        _wait(f"http://127.0.0.1:{port}/health", process, folder / "log")
        yield f"http://127.0.0.1:{port}/v1", folder
    finally:
        process.terminate()
        process.wait(timeout=30)


def _wait(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    raise AssertionError(log.read_text())


def evaluate(recipe: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "dominie", "evaluate", str(recipe), "--json"],
        cwd=recipe.parent,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )


def test_a_tiny_model_answers_and_judges_over_a_real_server(served, tmp_path):
    url, models = served
    there = {"endpoint": url, "concurrency": 2, "timeout": 60.0}
    recipe = write_recipe(
        tmp_path / "mt.yaml",
        {
            "evaluate": {
                "endpoints": {"it": {**there, "model": str(models / "student")}},
                "benchmarks": {
                    "mt": {
                        **mt_bench_files(tmp_path, 8),
                        "judge": {**there, "model": str(models / "rates"), "max_tokens": 8},
                        "max_new_tokens": 8,
                        "control_questions": 2,
                    }
                },
            }
        },
    )
    done = evaluate(recipe)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout)["results"]["it"]["mt"]
    assert result["n"] == 8
    assert result["unscored"] == 0
    assert 1 <= result["rating"] <= 10
    records = (run_folder(recipe) / "evaluation" / "mt.replies.jsonl").read_text().splitlines()
    replies = [read_reply(json.loads(line)["body"]) for line in records]
    assert all(reply is not None and reply.usage for reply in replies)
    ratings = {reply.text.strip() for reply in replies}
    assert len(ratings) > 1, "the verdict depends on what is judged"
    again = evaluate(recipe)
    assert json.loads(again.stdout)["results"] == json.loads(done.stdout)["results"]
    assert len(records) == 16 + 2 * 2 * 2
    lines = (run_folder(recipe) / "evaluation" / "mt.replies.jsonl").read_text().splitlines()
    assert lines == records  # nothing was asked again


def alpaca_recipe(folder: Path, served, **settings) -> Path:
    url, models = served
    rows = [{"instruction": f"copy {i}", "output": "red " * i} for i in range(1, 7)]
    (folder / "base.json").write_text(json.dumps(rows))
    there = {"endpoint": url, "concurrency": 2, "timeout": 60.0}
    benchmark = {
        "kind": "alpaca_eval",
        "baseline": "base.json",
        "judge": {**there, "model": str(models / "compares"), "max_tokens": 8},
        "max_new_tokens": 8,
        "control_questions": 2,
        **settings,
    }
    endpoint = {**there, "model": str(models / "student")}
    tree = {"evaluate": {"endpoints": {"it": endpoint}, "benchmarks": {"alpaca": benchmark}}}
    return write_recipe(folder / "alpaca.yaml", tree)


def test_both_orders_are_compared_over_a_real_server(served, tmp_path):
    done = evaluate(alpaca_recipe(tmp_path, served, version=1))
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout)["results"]["it"]["alpaca"]
    assert result["n"] == 6
    assert result["unscored"] == 0
    assert "(at least 10)" in result["length_control"] or "deviations" in result["length_control"]


def test_a_judge_that_says_something_else_gives_no_figure(served, tmp_path):
    done = evaluate(alpaca_recipe(tmp_path, served, version=2))  # which wants m or M
    assert done.returncode == 1, done.stdout + done.stderr
    assert "it on alpaca: 0 of 12" in done.stderr
    assert json.loads((run_folder(tmp_path / "alpaca.yaml") / "results.json").read_text()) == {
        "it": {}
    }


def test_a_model_that_is_not_served_is_one_message(served, tmp_path):
    url, _ = served
    there = {"endpoint": url, "model": "nobody/nowhere", "timeout": 60.0, "retries": 1}
    recipe = write_recipe(
        tmp_path / "mt.yaml",
        {
            "evaluate": {
                "endpoints": {"it": {**there, "backoff": 0.01}},
                "benchmarks": {"mt": {**mt_bench_files(tmp_path, 8), "judge": there}},
            }
        },
    )
    done = evaluate(recipe)
    assert done.returncode in (1, 2), done.stderr
    assert done.stderr.count("error: ") == 1
    assert "Traceback" not in done.stderr
