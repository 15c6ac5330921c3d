"""A run of several processes gives the results of one process, and they end together."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import forks
import psutil
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from dominie.core.display import Display
from dominie.core.distributed import EXIT_PEER_LOST, LAUNCHER
from dominie.core.errors import InputError
from dominie.core.launch import (
    ENGINES,
    accelerate_environment,
    launch,
    run_ranks,
    without_options,
)
from dominie.recipe import load_recipe
from dominie.workflows.pipeline import run_recipe

RECIPE = Path(__file__).parents[1] / "recipes" / "ranks.yaml"
STAGES = ("teacher", "distill", "align")


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "dominie", "run", str(RECIPE), *map(str, arguments)]


def dominie(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments),
        cwd=cwd,
        env=forks.ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=280,
    )


@pytest.fixture(scope="module")
def of_one(tmp_path_factory) -> Path:
    """The run of one process."""
    runs = tmp_path_factory.mktemp("one") / "runs"
    return run_recipe(load_recipe(RECIPE), runs, Display(Console(quiet=True)))


@pytest.fixture(scope="module")
def of_two(tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """The run of two, and what it printed."""
    cwd = tmp_path_factory.mktemp("two")
    done = forks.dominie_on_two("run", RECIPE, "--json", cwd=cwd)
    assert done.returncode == 0, done.stderr
    return cwd / "runs" / "ranks", done


def lines(run: Path, stage: str) -> list[dict]:
    return [json.loads(line) for line in (run / stage / "metrics.jsonl").read_text().splitlines()]


def untimed(value: object, name: str = "") -> dict[str, float]:
    """The numbers of a record by path, without clock times."""
    if isinstance(value, dict | list):
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        parts = [untimed(each, f"{name}.{key}") for key, each in pairs]
        return {path: number for part in parts for path, number in part.items()}
    return {} if "second" in name or "memory" in name else {name: value}


def check_same_weights(run: Path, other: Path, stage: str, *, atol: float) -> None:
    ours, theirs = (load_file(r / stage / "model" / "model.safetensors") for r in (run, other))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=atol, msg=f"{stage}, {name}")


@pytest.mark.parametrize("stage", STAGES)
def test_two_processes_learn_what_one_does(of_one, of_two, stage):
    run, _ = of_two
    # Sums in another order, through four steps of Adam at 2e-3.
    check_same_weights(run, of_one, stage, atol=2e-5)
    for two, one in zip(lines(run, stage), lines(of_one, stage), strict=True):
        assert untimed(two) == pytest.approx(untimed(one), rel=1e-4, abs=1e-6)


@pytest.mark.full
def test_two_processes_stop_where_one_does(of_one, tmp_path):
    """The first step has a rate of 0, the second moves the student."""
    measured = [line["evaluation"] for line in lines(of_one, "align") if "evaluation" in line]
    bound = measured[0]["domain"]["forgetting"] / 2
    assert bound > 0.01
    stop = f"stages.align.train.stop_at={{forgetting: {{domain: {bound}}}}}"
    changed = ["stages.align.train.evaluate_every=1", stop]
    one = run_recipe(load_recipe(RECIPE, changed), tmp_path / "one", Display(Console(quiet=True)))
    done = dominie("--nproc", 2, *changed, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    two = tmp_path / "runs" / "ranks"
    ours, theirs = (json.loads((r / "align/stage.json").read_text())["stopped"] for r in (two, one))
    assert (ours["step"], ours["kept_step"]) == (theirs["step"], theirs["kept_step"]) == (2, 1)
    assert " ".join(done.stdout.split()).count(f"stopped: {ours['why']}") == 1
    check_same_weights(two, one, "align", atol=2e-5)


def test_what_is_written_once_is_written_once(of_two):
    run, done = of_two
    assert json.loads(done.stdout) == {"run": "runs/ranks", "results": {}}
    assert done.stderr.count("general: read") == 1
    assert done.stderr.count("supervised tokens") == len(STAGES)
    for stage in STAGES:
        steps = [line["step"] for line in lines(run, stage) if "terms" in line]
        assert steps == [1, 2, 3, 4]
        assert {path.name for path in (run / stage).iterdir()} == {
            "model", "metrics.jsonl", "stage.json",
        }  # fmt: skip
    assert not list(run.glob("**/.writing*"))


def running(cwd: Path, *arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command(*arguments), cwd=cwd, env=forks.ENVIRONMENT, stdout=-1, stderr=-1, text=True
    )


def wait_for(path: Path, process: subprocess.Popen[str]) -> list[psutil.Process]:
    """The ranks, once a file is there."""
    deadline = time.monotonic() + 200
    while not path.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert process.poll() is None, process.communicate()
    return psutil.Process(process.pid).children()


def copy_of(run: Path, cwd: Path, *, without: str) -> Path:
    """A run whose last stages are still to do."""
    shutil.copytree(run.parent, cwd / "runs")
    for stage in STAGES[STAGES.index(without) :]:
        shutil.rmtree(cwd / "runs" / "ranks" / stage)
    return cwd / "runs" / "ranks"


LONG = ("stages.align.train.steps=4000",)


@pytest.mark.full
def test_a_process_that_is_killed_ends_all_of_them_with_one_message(of_one, tmp_path):
    run = copy_of(of_one, tmp_path, without="align")
    process = running(tmp_path, "--nproc", 2, *LONG)
    ranks = wait_for(run / "align" / "checkpoints" / "checkpoint-1", process)
    time.sleep(0.5)  # it may be the last file of a step that they are about to end together
    next(rank for rank in ranks if rank.environ()["RANK"] == "1").kill()
    _, printed = process.communicate(timeout=100)
    assert process.returncode == 137
    assert printed.count("error:") == 1
    assert "process 1 of 2 was ended by SIGKILL" in printed
    assert "Traceback" not in printed
    assert not any(rank.is_running() for rank in ranks)


def interrupt_and_resume(run: Path, cwd: Path, first: int, then: int) -> None:
    """End a run by SIGTERM after the first of the four steps of `distill`, and resume it."""
    ways = {1: (), 2: ("--nproc", 2)}
    process = running(cwd, *ways[first])
    wait_for(run / "distill" / "checkpoints" / "checkpoint-1", process)
    process.send_signal(signal.SIGTERM)
    _, printed = process.communicate(timeout=100)
    assert process.returncode == 143, printed
    assert printed.count("error:") == 1
    assert "interrupted by SIGTERM; everything so far is saved" in printed
    assert json.loads((run / "distill" / "stage.json").read_text())["status"] == "running"
    done = dominie(*ways[then], cwd=cwd)
    assert done.returncode == 0, done.stderr


@pytest.mark.full
@pytest.mark.parametrize(("first", "then"), [(2, 1), (1, 2)])
def test_a_run_goes_on_with_another_number_of_processes(of_one, tmp_path, first, then):
    run = copy_of(of_one, tmp_path, without="distill")
    interrupt_and_resume(run, tmp_path, first, then)
    for stage in ("distill", "align"):
        check_same_weights(run, of_one, stage, atol=2e-5)
        steps = [line["step"] for line in lines(run, stage) if "terms" in line]
        assert steps == [1, 2, 3, 4]


@pytest.mark.full
def test_two_processes_that_were_cut_off_end_in_the_same_bits(of_two, tmp_path):
    whole, _ = of_two
    run = copy_of(whole, tmp_path, without="distill")
    interrupt_and_resume(run, tmp_path, 2, 2)
    for stage in ("distill", "align"):
        check_same_weights(run, whole, stage, atol=0.0)


@pytest.mark.full
def test_ranks_outlive_their_launcher_only_to_save(of_one, tmp_path):
    run = copy_of(of_one, tmp_path, without="align")
    process = running(tmp_path, "--nproc", 2, *LONG)
    ranks = wait_for(run / "align" / "checkpoints" / "checkpoint-1", process)
    process.kill()
    _, alive = psutil.wait_procs(ranks, timeout=60)
    process.communicate()
    assert not alive
    assert list((run / "align" / "checkpoints").glob("checkpoint-*"))


#: Without `--multi_gpu` accelerate starts one process where there is no GPU.
LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--standalone", "--nproc-per-node=2"],
    "accelerate": ["accelerate.commands.launch", "--multi_gpu", "--num_processes=2"],
}


@pytest.mark.full
@pytest.mark.parametrize("launcher", LAUNCHERS.values(), ids=LAUNCHERS)
def test_other_launchers_run_it_too(of_one, tmp_path, launcher):
    run = copy_of(of_one, tmp_path, without="align")
    full = [sys.executable, "-m", *launcher, "-m", "dominie", "run", str(RECIPE)]
    done = subprocess.run(full, cwd=tmp_path, env=forks.ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    printed = [line.split()[:2] for line in done.stdout.splitlines()]
    assert printed.count(["done", "align"]) == 1
    check_same_weights(run, of_one, "align", atol=2e-5)
    wrong = [*full, "train.batch=7", "train.micro_batch=null"]
    done = subprocess.run(
        wrong, cwd=tmp_path, env=forks.ENVIRONMENT, capture_output=True, text=True
    )
    assert done.stderr.count("the batch cannot be shared out over the ranks") == 1


@pytest.mark.full
def test_an_error_of_every_process_is_printed_once(tmp_path):
    done = dominie("--nproc", 2, "train.batch=7", "train.micro_batch=null", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.count("error:") == 1
    assert "a multiple of 2 ranks" in done.stderr


@pytest.mark.full
def test_a_loss_that_jumps_stops_all_processes_at_the_step_that_stops_one(tmp_path):
    still = ["train.learning_rate=1e-9", "train.steps=40", "train.max_spike=1.01"]  # batches differ
    stopped = []
    for processes in (1, 2):
        cwd = tmp_path / str(processes)
        cwd.mkdir()
        done = dominie("--nproc", processes, *still, "--only", "teacher", cwd=cwd)
        assert done.returncode == 1, done.stderr
        assert done.stderr.count("error:") == 1
        assert "the loss jumps" in done.stderr
        record = cwd / "runs" / "ranks" / "teacher" / "broken-step.json"
        stopped.append(json.loads(record.read_text()))
    one, two = stopped
    assert one["step"] == two["step"] > 20
    assert one["conversations"] == two["conversations"]
    assert len(one["conversations"]) == 8


@pytest.fixture
def launched(monkeypatch, capfd):
    """Runs a program on two ranks from this process: the exit status and what was printed."""
    for name in (LAUNCHER, "TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "TORCHELASTIC_SIGNALS_TO_HANDLE"):
        monkeypatch.setenv(name, "0")  # so that it is restored

    def run(program: str) -> tuple[int, str]:
        handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
        monkeypatch.delenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT")
        status = run_ranks([sys.executable, "-c", program], 2)
        assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == handlers
        return status, capfd.readouterr().err

    return run


FAIL = "import os, sys, time\nif os.environ['RANK'] == '1': {}\ntime.sleep(60)"
REPORT = (
    "from dominie.core.distributed import report_error; report_error('no {}', {}); sys.exit({})"
)
#: Rank 1 reports, rank 0 ends because it has lost rank 1.
LOSE = (
    "import os, pathlib, sys, time\n"
    f"if os.environ['RANK'] == '1': {REPORT.format('data', 2, 2)}\n"
    "report = pathlib.Path(os.environ['TORCHELASTIC_ERROR_FILE']).parents[1] / '1' / 'error.json'\n"
    "while not report.exists(): time.sleep(0.01)\n"
    f"sys.exit({EXIT_PEER_LOST})"
)


@pytest.mark.parametrize(
    ("program", "status", "message"),
    [
        ("pass", 0, ""),
        (FAIL.format("sys.exit(2)"), 2, "process 1 of 2 ended with status 2"),
        (FAIL.format("os.kill(os.getpid(), 9)"), 137, "process 1 of 2 was ended by SIGKILL"),
        (FAIL.format(REPORT.format("data", 2, 2)), 2, "error: no data\n"),
        (f"import sys\n{REPORT.format('room', 1, 1)}", 1, "error: no room\n"),
        (LOSE, 2, "error: no data\n"),
    ],
    ids=["none", "exits", "is killed", "reports", "all report", "is lost"],
)
def test_all_ranks_end_with_the_first_that_fails_and_one_message(
    launched, program, status, message
):
    began = time.monotonic()
    code, printed = launched(program)
    assert time.monotonic() - began < 30  # seconds: a rank that is left would sleep for 60
    assert code == status
    assert printed.count("error:") == bool(status)
    assert message in printed
    assert "Traceback" not in printed


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_signals_reach_every_rank_once_and_are_waited_for(launched, tmp_path, signum):
    program = (
        "import os, pathlib, signal, sys, time\ncame = []\n"
        "from dominie.core.distributed import report_error\n"
        f"signal.signal({int(signum)}, lambda *_: came.append(1))\n"
        f"(pathlib.Path({str(tmp_path)!r}) / os.environ['RANK']).touch()\n"
        "while not came: time.sleep(0.01)\ntime.sleep(0.5)\n"
        "report_error(f'saved after {len(came)} signal', 100 + len(came)); sys.exit(100)"
    )
    send_when(signum, lambda: len(list(tmp_path.iterdir())) == 2)
    assert launched(program) == (101, "error: saved after 1 signal\n")


def test_ranks_that_end_without_a_report_after_a_signal(launched, tmp_path):
    send_when(signal.SIGTERM, (tmp_path / "r").exists)
    status, printed = launched(f"open({str(tmp_path)!r} + '/r', 'w'); import time; time.sleep(60)")
    assert (status, printed) == (143, "error: interrupted by SIGTERM; what was done is kept\n")


def send_when(signum: int, condition: Callable[[], bool]) -> None:
    """Send this process a signal as soon as a condition holds."""

    def watch() -> None:
        while not condition():
            time.sleep(0.02)
        os.kill(os.getpid(), signum)

    threading.Thread(target=watch, daemon=True).start()


def test_a_rank_stops_when_its_launcher_is_gone(tmp_path):
    program = (
        "import os, pathlib, signal, sys, time\n"
        "from dominie.core.launch import stop_with_launcher\n"
        f"place = pathlib.Path({str(tmp_path)!r})\n"
        "def stop(*_): (place / f'stopped-{rank}').touch(); sys.exit(1)\n"
        "rank = os.environ['RANK']; signal.signal(signal.SIGTERM, stop); stop_with_launcher()\n"
        "(place / rank).touch(); time.sleep(60)"
    )
    code = "import sys; from dominie.core.launch import run_ranks; run_ranks(sys.argv[1:], 2)"
    launcher = subprocess.Popen([sys.executable, "-c", code, sys.executable, "-c", program])
    while len(list(tmp_path.iterdir())) < 2:
        time.sleep(0.01)
    ranks = psutil.Process(launcher.pid).children()
    assert all(os.getpgid(rank.pid) == rank.pid for rank in ranks)  # a terminal's Ctrl-C comes once
    launcher.kill()
    _, alive = psutil.wait_procs(ranks, timeout=30)
    launcher.wait()
    assert not alive
    assert {path.name for path in tmp_path.iterdir()} == {"0", "1", "stopped-0", "stopped-1"}


def test_what_the_launcher_refuses(monkeypatch):
    with pytest.raises(InputError, match="no such engine"):
        launch([], 2, engine="fsdp3")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    with pytest.raises(InputError, match="sharded over GPUs"):
        launch([], 2, engine="fsdp2")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    with pytest.raises(InputError, match="not as many devices"):
        launch([], 2)


def test_options_of_the_launcher_are_not_passed_on():
    given = ["run", "r.yaml", "--nproc", "2", "--engine=ddp", "x=--nproc", "--runs", "r"]
    left = without_options(given, "--nproc", "--engine")
    assert left == ["run", "r.yaml", "x=--nproc", "--runs", "r"]


@pytest.mark.parametrize("engine", ENGINES)
def test_engines_that_ship_are_what_accelerate_reads(engine):
    variables = accelerate_environment(engine, 2)
    expected = {
        "ddp": {},
        "fsdp2": {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"},
        "zero3": {
            "ACCELERATE_USE_DEEPSPEED": "true",
            "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3",
            "ACCELERATE_DEEPSPEED_ZERO3_INIT": "false",
        },
    }[engine]
    assert variables.items() >= expected.items()
