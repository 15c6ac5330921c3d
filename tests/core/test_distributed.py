"""What ranks agree on, alone and with others, and which of them prints an error."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from dominie.core import distributed as ranks

WORKER = Path(__file__).parent / "distributed_rank.py"


def test_two_ranks(run_ranks, tmp_path):
    run_ranks(WORKER, tmp_path)


def test_a_single_process_needs_no_process_group(monkeypatch):
    monkeypatch.setattr(ranks, "init_distributed", lambda: pytest.fail("not needed"))
    assert (ranks.rank(), ranks.world_size(), ranks.is_main_process()) == (0, 1, True)
    assert ranks.broadcast_from_main(lambda: 3) == 3
    assert ranks.all_gather("a") == ["a"]
    assert ranks.all_reduce_max(3) == 3
    assert ranks.world_mesh() is None
    with ranks.main_process_first(), ranks.one_process_at_a_time():
        pass
    ranks.end_training()
    ranks.destroy_distributed()


@pytest.fixture
def report(monkeypatch, capsys, tmp_path):
    """Reports an error as a rank under some launcher: what it printed, and its error file."""

    def run(rank: int, launcher: int | None) -> tuple[str, dict | None]:
        file = tmp_path / str(rank) / "error.json"
        file.parent.mkdir(exist_ok=True)
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
        if launcher is None:
            monkeypatch.delenv(ranks.LAUNCHER, raising=False)
        else:
            monkeypatch.setenv(ranks.LAUNCHER, str(launcher))
        ranks.report_error("no data", 2)
        return capsys.readouterr().err, json.loads(file.read_text()) if file.exists() else None

    return run


def test_our_launcher_gets_the_error_in_the_agent_s_format(report, tmp_path):
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

    printed, written = report(1, launcher=os.getppid())
    assert printed == ""
    assert (written["message"], written["status"]) == ("no data", 2)
    failure = ProcessFailure(1, os.getpid(), 2, str(tmp_path / "1" / "error.json"))
    assert failure.message == "no data"
    assert failure.timestamp == int(written["timestamp"])


@pytest.mark.parametrize("launcher", [None, 1 << 22])
def test_without_our_launcher_the_first_rank_prints(report, launcher):
    assert report(1, launcher) == ("error: no data\n", None)
    assert report(0, launcher) == ("", None)


def test_only_a_rank_can_lose_a_peer(monkeypatch):
    lost = RuntimeError("Connection closed by peer [127.0.0.1]:1")
    error = ValueError("while saving")
    error.__context__ = lost
    assert not ranks.is_peer_loss(error)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert ranks.is_peer_loss(error)
    assert not ranks.is_peer_loss(RuntimeError("out of memory"))
