"""The ranks of a run share the questions of an evaluation; the results are those of one process."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from forks import dominie, dominie_on_two, interpreter
from rich.console import Console

from dominie.core.display import Display
from dominie.recipe import load_recipe
from dominie.workflows.pipeline import run_recipe

RECIPE = """\
name: shop
data: {{shop: {{path: shop.jsonl, test_fraction: 1.0}}}}
evaluate:
  models: {{small: "toyworld:student", large: "toyworld:teacher"}}
  batch: 4
  tasks:
    exact: {{source: shop, by: kind, max_new_tokens: 3}}
    words: {{source: shop, metric: token_f1, max_new_tokens: 3}}
    pick: {{source: shop, metric: choice, options: offered}}
    near: {{source: shop, metric: agreement, teacher: "toyworld:teacher"}}
    few: {{source: shop, limit: 2, max_new_tokens: 2}}
  benchmarks:
    mt: {{questions: questions.jsonl, control_questions: 1, max_new_tokens: 3,
         judge: {{endpoint: "{url}", model: judge}}}}
"""


@pytest.fixture
def judge() -> Iterator[ThreadingHTTPServer]:
    """Rates everything 7, and counts what it is asked."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            server.calls += 1
            message = {"role": "assistant", "content": "Rating: [[7]]"}
            body = json.dumps({"choices": [{"message": message, "finish_reason": "stop"}]})
            self.send_response(200)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *_: Any) -> None:
            pass

    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.calls = 0
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def written_recipe(folder: Path, text: str, **values: Any) -> Path:
    rows = [
        {
            "prompt": f"the {colour} {'big ' * (i % 3)}{thing} ?",
            "completion": colour,
            "kind": thing,
            "offered": ["red", "blue", "green and black"],
        }
        for i, colour in enumerate(("red", "blue", "blue", "red"))
        for thing in ("lamp", "desk", "scarf")
    ]
    (folder / "shop.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = {"question_id": 1, "category": "writing", "turns": ["copy red", "copy blue"]}
    (folder / "questions.jsonl").write_text(json.dumps(asked) + "\n")
    (folder / "shop.yaml").write_text(text.format(**values))
    return folder / "shop.yaml"


def run_on_two(recipe: Path) -> subprocess.CompletedProcess[str]:
    done = dominie_on_two("run", recipe, "--json", cwd=recipe.parent)
    assert done.returncode == 0, done.stderr
    return done


def run_on_one(recipe: Path) -> dict[str, Any]:
    """What a run in this process writes."""
    display = Display(Console(quiet=True))
    return written(run_recipe(load_recipe(recipe), recipe.parent / "one", display))


def written(run: Path) -> dict[str, Any]:
    """What an evaluation has written; the names alone of files with clock times."""
    files = {str(path.relative_to(run)): path for path in run.rglob("*") if path.is_file()}
    same = [
        name
        for name in files
        if name.startswith(("evaluation", "results")) and not re.search("/mt/|replies", name)
    ]
    return {"files": sorted(files)} | {name: files[name].read_text() for name in same}


def test_two_processes_score_what_one_does_and_pay_the_judge_once(tmp_path, judge):
    url = f"http://127.0.0.1:{judge.server_address[1]}/v1"
    recipe = written_recipe(tmp_path, RECIPE, url=url)
    one = run_on_one(recipe)
    calls = judge.calls
    done = run_on_two(recipe)
    assert written(tmp_path / "runs" / "shop") == one
    assert judge.calls == 2 * calls > 8
    assert done.stderr.count("small exact") == 1, "one process prints"
    results = json.loads(done.stdout)["results"]
    assert results == json.loads(one["results.json"])
    assert list(results["small"]) == ["exact", "words", "pick", "near", "few", "mt"]
    assert {"evaluation/small/exact.json", "evaluation/large/near.jsonl"} <= one.keys()


FAILING = """\
import os, sys
from dominie.core.errors import InputError
from dominie.evaluation.scoring import LIKENESSES
original = LIKENESSES["agreement"]
def agreement(*given, **options):
    if os.environ["RANK"] == "1":
        raise InputError("no memory is left", where="rank 1")
    return original(*given, **options)
LIKENESSES["agreement"] = agreement
sys.argv = ["dominie", "run", {recipe!r}]
from dominie.cli import main
main()
"""


def test_an_error_of_one_rank_ends_all_of_them_with_one_message(tmp_path):
    tasks = RECIPE.split("  benchmarks:")[0]
    recipe = written_recipe(tmp_path, tasks)
    script = tmp_path / "failing.py"
    script.write_text(FAILING.format(recipe=str(recipe)))
    launch = "import sys; from dominie.core.launch import run_ranks; "
    launch += f"sys.exit(run_ranks([{interpreter()!r}, {str(script)!r}], 2))"
    done = dominie(cwd=tmp_path, program=launch)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("error:") == 1
    assert "rank 1: no memory is left" in done.stderr
    assert "Traceback" not in done.stderr
    folder = tmp_path / "runs" / "shop"
    assert (folder / "evaluation" / "small" / "exact.json").exists(), "what was scored is kept"
    assert not (folder / "results.json").exists()


@pytest.mark.full
@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="needs lm-eval")
def test_lm_eval_runs_on_the_main_process_alone(tmp_path):
    rows = [
        {"question": f"{colour} {colour}", "answer": i % 2, "choices": [" red", " blue green"]}
        for i, colour in enumerate(["red", "blue", "green", "black"])
    ]
    (tmp_path / "colours.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "colours.yaml").write_text(
        "task: toy_colours\ndataset_path: json\ntest_split: test\noutput_type: multiple_choice\n"
        f"dataset_kwargs: {{data_files: {{test: {tmp_path / 'colours.jsonl'}}}}}\n"
        'doc_to_text: "{{question}}"\ndoc_to_target: "{{answer}}"\ndoc_to_choice: "{{choices}}"\n'
        "metric_list: [{metric: acc}]\n"
    )
    text = RECIPE.split("  tasks:")[0] + (
        "  tasks:\n"
        "    harness: {{metric: lm_eval, lm_eval: {{tasks: [toy_colours], include: tasks}}}}\n"
        "    exact: {{source: shop, max_new_tokens: 3}}\n"
    )
    recipe = written_recipe(tmp_path, text)
    one = run_on_one(recipe)
    run_on_two(recipe)
    assert written(tmp_path / "runs" / "shop") == one
    assert json.loads(one["results.json"])["small"]["harness"]["n"] == 4
