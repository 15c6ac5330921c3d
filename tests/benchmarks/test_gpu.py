"""What `benchmarks/gpu.sh` runs can run where little is installed, survives failures, and ends."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"
BARE = Path(__file__).parent / "bare"
WHEELS = BENCHMARKS / "wheels.txt"
SCRIPT = (BENCHMARKS / "gpu.sh").read_text()
#: The real model and real rows, for those who have them.
MODEL = Path(os.environ.get("DOMINIE_SMOLLM2", ""))
DATA = Path(os.environ.get("DOMINIE_SHARED_DATA", ROOT.parent / "shared" / "data"))
DOMAIN = DATA / "ecommerce" / "Lenovo" / "tasks" / "EN-Lenovo-NER-NER" / "test.json"
GENERAL = DATA / "alpaca_eval" / "v1" / "annotations_gpt-3.5-turbo-0301.json"

LONG = pytest.mark.timeout(600)  # a minute or two each, on a machine with nothing else to do


def on_a_bare_machine(*command, wheels=True, timeout=570, **variables):
    """Run a command where there is PyTorch and little else, but for the wheels."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": f"{BARE}:{ROOT / 'src'}:{os.environ.get('PYTHONPATH', '')}",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",  # whose python3 is ours
        **({"BARE_BROUGHT": str(WHEELS)} if wheels else {}),
        **variables,
    }
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout,
        check=False,
    )  # fmt: skip


@pytest.fixture
def benchmark(monkeypatch):
    """Imports a benchmark as a module."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.syspath_prepend(str(BENCHMARKS / "parts"))
    return importlib.import_module


def test_the_calls_fit_their_machine_and_parts_stop_themselves_before():
    first, second = re.split(r"\n  second\)", SCRIPT.split("case $call in")[1])
    limits = [
        [int(n) for n in re.findall(r"^ *(?:part|figures) (\d+) ", text, re.MULTILINE)]
        for text in (first, second)
    ]
    assert [len(each) for each in limits] == [4, 3]
    assert sum(limits[0]) <= 460
    assert sum(limits[1]) <= 280
    assert '--seconds "$((seconds - 20))"' in SCRIPT
    assert int(re.search(r"--session-timeout=(\d+)", SCRIPT)[1]) + 20 <= limits[0][0]


def test_nothing_is_imported_that_a_bare_machine_lacks():
    program = "import sys; sys.path.insert(0, 'benchmarks'); import attention, prediction, geometry"
    done = on_a_bare_machine(sys.executable, "-c", program, wheels=False)
    assert done.returncode == 0, done.stderr


def test_the_wheels_are_those_of_the_tested_set():
    def pins(file):
        lines = [line for line in file.read_text().splitlines() if "==" in line]
        return {line.split("==")[0]: line.split("==")[1] for line in lines}

    known, brought = pins(ROOT / "constraints.txt"), pins(WHEELS)
    assert {"pydantic", "liger-kernel", "trl", "gguf", "pcodec"} <= set(brought)
    assert {name: v for name, v in brought.items() if known.get(name, v) != v} == {}


@pytest.mark.parametrize("method", ["attention", "maps"])
def test_a_step_that_recomputes_layers_learns_the_same(benchmark, method):
    attention = benchmark("attention")
    gradients = []
    for checkpointing in (False, True):
        step = attention.Step(16, checkpointing=checkpointing)
        run = step.maps if method == "maps" else lambda s=step: s.attention("tiles", value=True)
        value = run()
        gradients.append([value, *(p.grad for p in step.student.parameters())])
        assert step.student.config._attn_implementation == "sdpa"
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_a_method_that_fails_ends_no_other(benchmark):
    turns, results = benchmark("_turns"), benchmark("_results")

    def failing(text):
        def method():
            raise RuntimeError(text)

        return method

    found = turns.taken_in_turns(
        {
            "short": failing("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"),
            "broken": failing("an illegal memory access"),
            "good": lambda: torch.tensor(3.0),
        },
        2,
        results.Deadline(),
    )
    assert len(found.wall["good"]) == 2
    assert found.values == {"good": 3.0}
    assert turns.notes(found, "short") == {"note": "does not fit", "wrong": None}
    assert turns.notes(found, "broken")["wrong"] == "RuntimeError: an illegal memory access"
    rows = results.gathered(
        [{"wrong": None}, turns.notes(found, "broken"), {"wrong": None}], as_json=False
    )
    assert rows.failed
    assert len(rows[""]) == 3


def test_a_job_that_fails_ends_no_other_and_unequal_losses_are_told(benchmark, monkeypatch):
    geometry, results = benchmark("geometry"), benchmark("_results")
    done = []

    def fitting_steps(student, taught, **options):
        done.append(taught)
        if len(done) == 2:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        if len(done) == 3:
            return None, [32, 16]
        loss = 2.0 if len(done) == 8 else 1.0  # the first plain job's
        return SimpleNamespace(
            seconds=1.0, peak=10, standing=None, micro_batch=8, taken=1, loss=loss
        ), []

    monkeypatch.setattr(geometry, "fitting_steps", fitting_steps)
    monkeypatch.setattr(geometry.Laboratory, "taught", lambda self, job, *_, **__: job.name)
    monkeypatch.setattr(geometry, "matrix_speed", lambda: 1e9)
    monkeypatch.setattr(geometry, "released", lambda: None)
    needed = benchmark("_geometry_models").Work(2.0, 1.0, 1.0)
    monkeypatch.setattr(geometry.Laboratory, "work", lambda *_, **__: needed)
    rows = list(
        geometry.measured(
            quick=True, rest=False, deadline=results.Deadline(), methods=("dominie", "plain")
        )
    )
    ours = [row for row in rows if row["method"] == "dominie"]
    assert [row["job"] for row in ours] == [job.name for job in geometry.JOBS]
    assert ours[1]["wrong"] == "RuntimeError: CUDA error: an illegal memory access was encountered"
    assert ours[2]["note"] == "does not fit: 32, 16 a pass"
    assert all(row["tokens_per_second"] for row in ours[3:7])
    assert [row["note"] for row in ours[7:]] == ["needs a GPU"] * 2
    plain = [row for row in rows if row["method"] == "plain"]
    assert plain[0]["wrong"] == "its loss is 2.0, dominie's 1.0"
    assert plain[1]["to_plain"] is None, "dominie's own job failed"
    assert plain[2]["to_plain"] == 1.0


MEASURED = {
    "geometry": [
        {"part": "L = 2048", "job": job, "method": "dominie", "tokens_per_second": rate,
         "of_bound": "51.5 %"}
        for job, rate in (("KD + attention", 1000), ("KD", 1080), ("DAE online", 970),
                          ("one teacher", 1000), ("DAE from cache", 900), ("next token", 1000),
                          ("KD + attention, packed", 900))
    ],
    "attention": [{"part": "step", "length": 4096, "method": "triton", "to_logits": 1.2}],
    "prediction": [
        {"part": "loss", "tokens": 8192, "vocabulary": 128256, "method": method, "seconds": seconds,
         "peak_mb": 100, "wrong": wrong}
        for method, seconds, wrong in (("dominie-triton", 0.06, None), ("liger", 0.08, None),
                                       ("trl", 0.2, "its loss is 3, dominie's 2"))
    ],
}  # fmt: skip


def test_the_summary_sets_figures_beside_goals(benchmark, tmp_path):
    summary = benchmark("gpu_summary")
    for name, rows in MEASURED.items():
        lines = [json.dumps(row) for row in rows]
        (tmp_path / f"{name}.jsonl").write_text("\n".join([*lines, '{"part": "L = 20']))
    (tmp_path / "machine.txt").write_text("H100, 1 November\n")
    (tmp_path / "tests.txt").write_text("..F\nFAILED tests/gpu/x.py::y - z\n1 failed, 2 passed\n")
    text = summary.summary(tmp_path)
    goals = [line.split(" | ") for line in text.splitlines() if "≤" in line or "≥" in line]
    found = {line[0].removeprefix("| "): (line[2], line[3].removesuffix(" |")) for line in goals}
    assert list(found.values()) == [
        ("51.5", "yes"), ("1.08", "yes"), ("1.2", "no"), ("–", "–"), ("1.03", "yes"),
        ("1.11", "no"), ("0.75", "yes"), ("1", "yes"), ("–", "–"), ("0.9", "no"),
    ]  # fmt: skip
    assert "1 failed, 2 passed" in text
    assert "wrong: prediction, loss, 8192, 128256, trl: its loss is 3" in text
    readme = (BENCHMARKS / "README.md").read_text()
    assert not [goal.text for goal in summary.GOALS if f"| {goal.text} |" not in readme]


def test_the_summary_is_short_whatever_was_measured(benchmark, tmp_path):
    summary = benchmark("gpu_summary")
    rows = [{"part": "step", "length": n, "method": "x", "seconds": 1.0} for n in range(3000)]
    (tmp_path / "attention.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "tests.txt").write_text("FAILED " + "x" * 20_000 + "\n1 failed\n")
    text = summary.summary(tmp_path)
    assert len(text) <= 11_000
    assert text.endswith("cut here")
    assert summary.summary(tmp_path / "nothing").count("–") >= 20


def test_parts_of_a_gguf_file_are_joined_in_their_order(benchmark, tmp_path):
    real_run = benchmark("real_run")
    (tmp_path / "a").write_bytes(b"GGUF, its first half")
    (tmp_path / "b").write_bytes(b" and its second")
    whole = Path(real_run.joined([tmp_path / "a", tmp_path / "b"], tmp_path))
    assert whole.read_bytes() == b"GGUF, its first half and its second"
    assert whole.suffix == ".gguf"
    assert real_run.joined([whole], tmp_path) == str(whole)


@LONG
@pytest.mark.full
def test_every_test_of_the_gpu_runs_on_the_cpu():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/gpu"]
    done = on_a_bare_machine(*command, DOMINIE_GPU_TESTS="cpu")
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
    assert "needs a GPU" not in done.stdout


@LONG
@pytest.mark.full
def test_a_part_that_fails_keeps_no_other_of_the_first_call_from_running(tmp_path):
    done = on_a_bare_machine(
        "bash", "benchmarks/gpu.sh", "first", "--quick",
        OUT=str(tmp_path), DOMINIE_GPU_TESTS="cpu", BARE_FAILS="attention.py",
    )  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr
    assert "attention.py fails on purpose" in done.stdout
    assert len(done.stdout) < 12_000
    assert len(list(tmp_path.iterdir())) <= 8
    assert " passed" in (tmp_path / "tests.txt").read_text()
    rows = rows_of(tmp_path / "geometry.jsonl")
    jobs = ("KD + attention", "KD", "KD + attention, packed", "DAE online", "one teacher",
            "DAE from cache", "next token")  # fmt: skip
    fused = [row for row in rows if "fused" in row["job"]]
    assert [row["note"] for row in fused] == ["needs a GPU"] * 2
    rows = [row for row in rows if row not in fused]
    assert [row["job"] for row in rows if row["method"] == "dominie"] == list(jobs)
    assert [row["job"] for row in rows if row["method"] == "plain"] == [
        "KD + attention", "KD", "DAE online", "DAE from cache",
    ]  # fmt: skip
    assert not [row for row in rows if row["wrong"] or row["note"]]
    assert all(row["steps"] and row["tokens_per_second"] > 0 for row in rows)
    assert (tmp_path / "attention.jsonl").read_text() == ""
    assert {"materialised", "dominie"} <= {
        row.get("method") for row in rows_of(tmp_path / "prediction.jsonl")
    }
    assert (tmp_path / "summary.md").read_text() in done.stdout


@LONG
@pytest.mark.full
def test_the_second_call_runs(tmp_path):
    done = on_a_bare_machine("bash", "benchmarks/gpu.sh", "second", "--quick", OUT=str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr + (tmp_path / "log.txt").read_text()
    assert_aligned(rows_of(tmp_path / "real_run.jsonl"))
    assert rows_of(tmp_path / "prediction.jsonl")
    assert rows_of(tmp_path / "geometry.jsonl")


@LONG
@pytest.mark.full
def test_the_rows_of_attention_are_made_on_a_bare_machine():
    script = ["benchmarks/attention.py", "--quick", "--json"]
    done = on_a_bare_machine(sys.executable, *script, wheels=False)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert {row["part"] for row in rows} == {"step", "layer", "error"}


@LONG
@pytest.mark.full
@pytest.mark.skipif(
    not (MODEL / "config.json").is_file() or not DOMAIN.is_file(),
    reason="DOMINIE_SMOLLM2 names no folder of SmolLM2-135M-Instruct, or there are no real rows",
)
def test_the_real_run_in_three_steps(tmp_path):
    done = on_a_bare_machine(
        sys.executable, "benchmarks/real_run.py", "--quick", "--json", "--model", str(MODEL),
        "--domain", str(DOMAIN), "--general", str(GENERAL),
        "--metric", "attribute_f1", "exact_match",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert_aligned([json.loads(line) for line in done.stdout.splitlines()])


def assert_aligned(rows):
    assert [row["model"] for row in rows] == ["before", "expert", "DAE"]
    assert rows[0]["general_kl"] == 0
    assert all(row["general_kl"] > 0 for row in rows[1:])
    assert [row["steps"] for row in rows] == [0, 3, 3]


def rows_of(file):
    return [json.loads(line) for line in file.read_text().splitlines()]
