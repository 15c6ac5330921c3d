"""Caches through the command line: what is missing is computed, by one process or by several."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from forks import ENVIRONMENT, dominie

RECIPE = """
name: mini
data:
  general: {path: "toyworld:general?rows=300", validation_fraction: 0.1, test_fraction: 0.1}
  domain: {path: "toyworld:domain?rows=160", validation_fraction: 0.1}
train: {learning_rate: 2e-3, steps: 6, batch: 8, micro_batch: 4, max_length: 64}
stages:
  expert: {student: "toyworld:teacher", data: {domain: 1.0}, loss: {next_token: 1.0}}
  align:
    student: toyworld:student
    data:
      domain: {share: 0.3, teacher: expert}
      general: {share: 0.7, teacher: "toyworld:teacher"}
    loss: {prediction: 1.0}
    cache: {threshold: 0.05}
"""


def cached(*arguments: object, cwd: Path) -> dict:
    done = dominie("cache", "r.yaml", "--json", *arguments, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def last_evaluation(cwd: Path) -> dict:
    record = json.loads((cwd / "runs/mini/align/stage.json").read_text())
    return record["final"]["evaluation"]


@pytest.fixture(scope="module")
def begun(tmp_path_factory) -> Path:
    """A run whose expert is trained and whose caches are full."""
    cwd = tmp_path_factory.mktemp("begun")
    (cwd / "r.yaml").write_text(RECIPE)
    before = cached(cwd=cwd)
    assert before["waiting"] == {"align": ["expert"]}
    assert [record["teacher"] for record in before["caches"]] == ["toyworld:teacher"]
    done = dominie("run", "r.yaml", cwd=cwd)
    assert done.returncode == 0, done.stderr
    assert "toyworld:teacher is cached" in done.stdout
    assert " 0 of them new" in done.stdout  # what `cache` wrote
    return cwd


WITHOUT_TEACHERS = """
import sys
from dominie.teachers.teacher import load_teacher
def refuse(*_, **__):
    raise AssertionError("a teacher was loaded")
for module in list(sys.modules.values()):
    if vars(module).get("load_teacher") is load_teacher:
        module.load_teacher = refuse
from dominie.cli import main
main()
"""


def test_training_from_caches_needs_no_teacher(begun, tmp_path):
    import shutil

    cwd = Path(shutil.copytree(begun, tmp_path / "copy"))
    shutil.rmtree(cwd / "runs/mini/align")
    done = dominie("run", "r.yaml", cwd=cwd, program=WITHOUT_TEACHERS)
    assert done.returncode == 0, done.stderr
    assert "done align" in done.stdout
    assert set(last_evaluation(cwd)) == {"general", "domain"}
    for curves in last_evaluation(cwd).values():
        assert curves["divergence"] > 0
    live = dominie("run", "r.yaml", "stages.align.cache=false", cwd=cwd, program=WITHOUT_TEACHERS)
    assert "a teacher was loaded" in live.stderr, "or this test proves nothing"


@pytest.mark.full
def test_live_and_cached_teachers_give_like_curves(begun, tmp_path):
    """The same stage with both teachers live, and with one of them; samples add noise only."""
    import shutil

    wanted = last_evaluation(begun)
    for override in ("stages.align.cache=false", "stages.align.data.domain.cache=false"):
        cwd = Path(shutil.copytree(begun, tmp_path / override))
        done = dominie("run", "r.yaml", override, cwd=cwd)
        assert done.returncode == 0, done.stderr
        assert ("expert is cached" in done.stdout) is False
        for source, curves in last_evaluation(cwd).items():
            assert curves["divergence"] == pytest.approx(wanted[source]["divergence"], rel=0.1)


@pytest.mark.full
def test_a_second_cache_computes_nothing_and_another_mix_reuses_it(begun):
    first = cached(cwd=begun)
    assert len(first["caches"]) == 2
    assert first["waiting"] == {}
    said = dominie("cache", "r.yaml", cwd=begun)
    assert said.stdout.count(" 0 of them new") == 2
    # The mix decides which rows come by; those that did before are there.
    mixed = dominie("cache", "r.yaml", "stages.align.train.steps=40", cwd=begun)
    assert mixed.returncode == 0, mixed.stderr
    again = dominie("cache", "r.yaml", "stages.align.train.steps=40", "train.seed=0", cwd=begun)
    assert again.stdout.count(" 0 of them new") == 2
    assert [r["supervised_tokens"] for r in cached(cwd=begun)["caches"]] >= [
        r["supervised_tokens"] for r in first["caches"]
    ]


def test_an_estimate_spends_nothing(tmp_path):
    (tmp_path / "r.yaml").write_text(RECIPE)
    found = cached("--estimate", cwd=tmp_path)
    assert not (tmp_path / "runs/mini/cache").exists()
    (record,) = found["caches"]
    assert record["supervised_tokens"] > 0
    sizes = [choice["bytes_per_token"] for choice in record["choices"]]
    errors = [choice["squared_error"] for choice in record["choices"]]
    assert sizes == sorted(sizes)
    assert errors == sorted(errors, reverse=True)
    assert [choice["chosen"] for choice in record["choices"]] == [False, True, False]
    for choice in record["choices"]:
        assert {"bytes", "seconds", "missing_mass", "excess_kl"} <= choice.keys()


SLOW = """
import sys, time
from dominie.data.shards import ShardWriter
from dominie.teachers import cache_writer
add = ShardWriter.add
def slowly(self, entries):
    add(self, entries)
    print("batch", len(entries), flush=True)
    time.sleep(0.3)
ShardWriter.add = slowly
cache_writer._CPU_BATCH_TOKENS = 256
sys.argv[0] = "dominie"
from dominie.cli import main
main()
"""


@pytest.mark.full
@pytest.mark.parametrize(("signum", "status"), [(signal.SIGKILL, -9), (signal.SIGINT, 130)])
def test_an_interruption_costs_what_was_in_flight(tmp_path, signum, status):
    (tmp_path / "r.yaml").write_text(RECIPE)
    command = [sys.executable, "-c", SLOW, "cache", "r.yaml", "stages.align.train.steps=80"]
    process = subprocess.Popen(
        command,
        cwd=tmp_path,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    written = 0
    while written < 40:
        line = process.stdout.readline()
        assert line or process.poll() is None, process.stderr and process.stderr.read()
        if line.startswith("batch"):
            written += int(line.split()[1])
    process.send_signal(signum)
    rest, said = process.communicate(timeout=120)
    assert process.returncode == status, said
    written += sum(int(x.split()[1]) for x in rest.splitlines() if x.startswith("batch"))
    again = dominie("cache", "r.yaml", "stages.align.train.steps=80", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    line = next(x for x in again.stdout.splitlines() if "is cached" in x)
    whole, new = (int(x.replace(",", "")) for x in (line.split()[5], line.split()[7]))
    assert whole - new >= written
    assert whole > written
    assert not list(tmp_path.glob("runs/mini/cache/*/.writing-*"))


@pytest.mark.full
def test_ranks_split_the_work(tmp_path):
    """As `accelerate launch` starts them, each with its RANK."""
    (tmp_path / "r.yaml").write_text(RECIPE)
    assert dominie("check", "r.yaml", cwd=tmp_path).returncode == 0  # one process makes the toys
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2",
        "--master_port", "29617", "-m", "dominie", "cache", "r.yaml",
    ]  # fmt: skip
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "runs/mini/cache").iterdir()
    assert len(list(folder.glob("shard-*.arrow"))) == 2
    said = dominie("cache", "r.yaml", cwd=tmp_path)
    assert " 0 of them new" in said.stdout


@pytest.mark.full
def test_two_processes_fill_one_named_folder(tmp_path):
    (tmp_path / "r.yaml").write_text(RECIPE)
    commands = [
        [sys.executable, "-m", "dominie", "cache", "r.yaml", f"name=run{n}", "--json",
         "stages.align.cache.folder=shared", f"stages.align.train.seed={n}"]
        for n in (1, 2)
    ]  # fmt: skip
    both = [
        subprocess.Popen(c, cwd=tmp_path, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True)
        for c in commands
    ]
    for process in both:
        process.communicate(timeout=200)
        assert process.returncode == 0
    for command in commands:
        done = subprocess.run(
            command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, check=True
        )
        assert " 0 of them new" in done.stderr
