"""The whole job through the command line, on a recipe of a few seconds."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from forks import ENVIRONMENT, Fork, dominie
from safetensors.torch import load_file

from dominie.core.display import Display
from dominie.core.errors import InputError
from dominie.workflows.chat import chat_models

MINI = Path(__file__).parents[1] / "recipes" / "mini.yaml"


def interpreted(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    """What `dominie` does in an interpreter of its own, which tells what it imports on stderr."""
    command = [sys.executable, "-X", "importtime", "-m", "dominie", *map(str, arguments)]
    return subprocess.run(
        command, cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, timeout=280, check=False
    )


#: What takes a second or more to import, and is needed only where a model runs.
SLOW = (
    "accelerate.accelerator",
    "peft",
    "scipy.optimize",
    "torch._dynamo",
    "torch._inductor",
    "torch.distributed.tensor",
    "transformers.masking_utils",
    "transformers.modeling_utils",
    "transformers.trainer_utils",
)


def imports(done: subprocess.CompletedProcess[str]) -> set[str]:
    """The modules that an interpreter has told of."""
    lines = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    return {line.rpartition("|")[2].strip() for line in lines}


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A finished run of the mini recipe, and what it printed."""
    cwd = tmp_path_factory.mktemp("finished")
    return cwd, interpreted("run", MINI, cwd=cwd)


def weights(run: Path, stage: str) -> bytes:
    return (run / stage / "model" / "model.safetensors").read_bytes()


def test_a_run_leaves_what_the_design_promises(finished):
    cwd, done = finished
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    run = cwd / "runs" / "mini"
    results = json.loads((run / "results.json").read_text())
    assert list(results) == [
        "untrained", "teacher", "sft", "distill", "expert", "merged", "align"
    ]  # fmt: skip
    for tasks in results.values():
        assert list(tasks) == ["general", "domain", "agreement"]
        for score in tasks.values():
            assert 0.0 <= score["score"] <= 1.0
            assert score["n"] > 0
    assert results["teacher"]["agreement"]["score"] == 1.0
    assert results["teacher"]["agreement"]["kl"] == pytest.approx(0.0, abs=1e-6)
    for stage in ("teacher", "sft", "distill", "expert", "align"):
        record = json.loads((run / stage / "stage.json").read_text())
        assert record["status"] == "done"
        assert not (run / stage / "checkpoints").exists()
        lines = [json.loads(x) for x in (run / stage / "metrics.jsonl").read_text().splitlines()]
        assert lines[-1]["step"] == 6
        evaluated = [line["evaluation"] for line in lines if "evaluation" in line]
        assert all(set(curves) == {"general", "domain"} for curves in evaluated)
    made = json.loads((run / "merged" / "stage.json").read_text())
    assert (made["kind"], made["models"]) == ("merge", ["distill", "expert"])
    assert "merged" in results
    page = (run / "report.html").read_text()
    assert "align" in page
    assert len(page) < 1_000_000
    for name in ("general", "domain"):
        assert f"{name}: read " in done.stdout
    score = f"{100 * results['align']['general']['score']:.1f} ("
    card = (run / "align" / "model" / "README.md").read_text()
    assert f"| general | exact_match | {score}" in card
    assert (
        "| merged | distill, expert | merge |"
        in (run / "merged" / "model" / "README.md").read_text()
    )


def test_models_load_with_transformers_alone(finished):
    run = finished[0] / "runs" / "mini"
    code = (
        "import sys; from transformers import AutoModelForCausalLM, AutoTokenizer as T\n"
        f"m = AutoModelForCausalLM.from_pretrained({str(run / 'align' / 'model')!r})\n"
        f"t = T.from_pretrained({str(run / 'align' / 'model')!r})\n"
        "assert t.chat_template and m.generation_config.eos_token_id is not None\n"
        "assert m.config.use_cache\n"
        "chat = [{'role': 'user', 'content': 'copy 1 2'}]\n"
        "asked = t.apply_chat_template(\n"
        "    chat, add_generation_prompt=True, return_tensors='pt', return_dict=True)\n"
        "assert m.generate(**asked, max_new_tokens=3).shape[1] > asked['input_ids'].shape[1]\n"
        "assert not any(name.startswith('dominie') for name in sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=ENVIRONMENT, timeout=120)


def test_a_second_run_does_nothing(finished):
    cwd, _ = finished
    before = weights(cwd / "runs" / "mini", "align")
    started = time.monotonic()
    again = interpreted("run", MINI, "--json", cwd=cwd)
    assert again.returncode == 0, again.stderr
    assert time.monotonic() - started < 60  # 15 s on an idle machine
    assert again.stderr.count("already trained") == 5
    assert again.stderr.count("already made") == 1
    assert again.stderr.count("already scored") == 7
    assert set(json.loads(again.stdout)["results"]) >= {"align"}
    assert {"torch", "dominie.stages.run_stages"} <= imports(again)
    assert not {*SLOW, "pandas", "datasets", "dominie.training.trainer"} & imports(again)
    assert weights(cwd / "runs" / "mini", "align") == before


def test_check_imports_no_code_of_models_once_it_has_counted_them(finished):
    cwd, _ = finished
    cold = dominie("check", MINI, cwd=cwd)  # counts, where no test before it has
    again = interpreted("check", MINI, cwd=cwd)
    assert again.returncode == cold.returncode == 0, again.stderr
    assert again.stdout == cold.stdout
    assert "torch" in imports(again)
    assert imports(again) & {*SLOW} == set()


def test_a_change_reruns_exactly_what_depends_on_it(finished, tmp_path):
    import shutil

    shutil.copytree(finished[0] / "runs", tmp_path / "runs")
    changed = dominie("run", MINI, "stages.expert.train.learning_rate=1e-3", cwd=tmp_path)
    assert changed.returncode == 0, changed.stderr
    for stage in ("teacher", "sft", "distill"):
        assert f"{stage} already trained" in changed.stdout
    for stage in ("expert", "merged", "align"):
        assert f"{stage}: what it depends on has changed" in changed.stdout
    kept = list((tmp_path / "runs" / "mini" / ".replaced").iterdir())
    assert {path.name.split("-")[0] for path in kept} == {"expert", "merged", "align"}


def test_a_part_of_a_run_leaves_the_others_scores(finished, tmp_path):
    import shutil

    import dominie as api

    runs = tmp_path / "runs"
    shutil.copytree(finished[0] / "runs", runs)
    before = json.loads((runs / "mini" / "results.json").read_text())
    done = api.run(MINI, runs=runs, only=["sft"])
    assert json.loads((runs / "mini" / "results.json").read_text()) == before
    assert list(done.results) == list(before)
    card = (runs / "mini" / "align" / "model" / "README.md").read_text()
    with pytest.raises(InputError, match=r"(?s)another stage align.*learning_rate"):
        api.evaluate(MINI, "stages.align.train.learning_rate=0.5", runs=runs)
    with pytest.raises(InputError, match="another stage merged"):
        api.evaluate(MINI, "stages.merged.merge.models={expert: 0.5, sft: 0.5}", runs=runs)
    assert (runs / "mini" / "align" / "model" / "README.md").read_text() == card
    weights = runs / "mini" / "align" / "model" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(InputError, match="damaged"):
        chat_models(["mini:align"], runs, Display())


def killed_when(appears: Path, *arguments: object, cwd: Path, signum: int) -> int:
    process = Fork(*arguments, cwd=cwd)
    deadline = time.monotonic() + 200
    while not appears.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert process.poll() is None, "it ended before it could be killed"
    process.send_signal(signum)
    return process.wait(timeout=100)


def lines_up_to(metrics: Path, step: int) -> list[str]:
    found = [line for line in metrics.read_text().splitlines() if line.endswith("}")]
    return [line for line in found if json.loads(line)["step"] <= step]


@pytest.mark.parametrize(
    ("stage", "signum", "status"),
    [
        ("teacher", signal.SIGKILL, -9),
        ("distill", signal.SIGTERM, 143),
        pytest.param("align", signal.SIGINT, 130, marks=pytest.mark.full),
    ],
)
def test_a_run_that_was_cut_off_ends_in_the_same_weights(finished, tmp_path, stage, signum, status):
    run = tmp_path / "runs" / "mini"
    # Long enough a stage that the signal arrives in its midst.
    cut = run / stage / "checkpoints" / "checkpoint-2"
    assert killed_when(cut, "run", MINI, cwd=tmp_path, signum=signum) == status
    before = lines_up_to(run / stage / "metrics.jsonl", step=2)
    resumed = dominie("run", MINI, cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    whole = finished[0] / "runs" / "mini"
    for each in ("teacher", "sft", "distill", "expert", "align"):
        ours = load_file(run / each / "model" / "model.safetensors")
        theirs = load_file(whole / each / "model" / "model.safetensors")
        assert all(bool((ours[name] == theirs[name]).all()) for name in theirs), each
    # The lines carry clock times, so that equal ones were not trained again.
    assert lines_up_to(run / stage / "metrics.jsonl", step=2) == before
    steps = [
        json.loads(line)["step"]
        for line in (run / stage / "metrics.jsonl").read_text().splitlines()
        if "terms" in line
    ]
    assert steps == sorted(set(steps)), "no step is recorded twice"
    assert (run / "results.json").read_text() == (whole / "results.json").read_text()
