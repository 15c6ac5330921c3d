"""One stage of a tiny model, trained in this process: cut off, damaged, moved, and gone on with."""

from __future__ import annotations

import gc
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tiny import tiny_folder
from transformers import TrainerCallback

from dominie.core.errors import DominieError
from dominie.data.tokenization import Encoded
from dominie.losses.terms import LossTerms, NextToken
from dominie.models.spec import Model
from dominie.toyworld.toy_models import word_tokenizer
from dominie.training.settings import Lora, TrainSettings
from dominie.training.stage_sources import StageSource, StageTraining
from dominie.training.train_stage import StageModels, train_stage

#: What each kind of stage sets. What is held out is noise, so that the best step comes early.
KINDS: dict[str, dict[str, Any]] = {
    "best": {"steps": 5, "keep": "best"},
    "adapter": {"steps": 5, "keep": "best", "lora": Lora(r=2, alpha=8, merge=False)},
    "patience": {"steps": 30, "keep": "best", "patience": 3},
    "spike": {"steps": 26, "max_spike": 3.0, "evaluate_every": 13},
}
#: Steps before which a stage of each kind is killed; `saved` is after the last checkpoint.
KILLED: dict[str, tuple[int | str, ...]] = {
    "best": (2, 4, "saved"),
    "adapter": ("saved",),
    "patience": (4,),
    "spike": (24,),
}
JUMP = 24  # the step of a `spike` whose loss jumps
_TIMES = {"seconds", "tokens_per_second", "throughput"}


class Killed(BaseException):
    """In the place of SIGKILL: nothing of the product catches it."""


class Kill(TrainerCallback):
    """Kills a stage before a step, or when the last checkpoint is written; makes a loss jump."""

    def __init__(self, when: int | str | None, jump: int | None = None) -> None:
        self.when, self.jump = when, jump

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step + 1 == self.when:
            raise Killed
        if state.global_step + 1 == self.jump:
            kwargs["model"].lm_head.weight.data *= -5

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.when == "saved" and state.global_step == state.max_steps:
            raise Killed


def _rows(count: int, seed: int, *, noise: bool) -> list[Encoded]:
    random = np.random.default_rng(seed)
    starts = random.integers(0, 40, count)
    ids = [random.integers(0, 61, 8).tolist() if noise else [*range(s, s + 8)] for s in starts]
    return [Encoded(row, [True] * 8) for row in ids]


@dataclass(frozen=True)
class Stages:
    """Makes stages from a student in a folder."""

    folder: Path

    @classmethod
    def begin(cls, folder: Path) -> Stages:
        tiny_folder(folder / "m", num_hidden_layers=1)
        return cls(folder)

    def train(
        self, kind: str, folder: Path, *, killed: int | str | None = None, seed: int = 0
    ) -> None:
        """Train, or go on; the same command each time but for where it is killed."""
        folder.mkdir(parents=True, exist_ok=True)
        record = {"status": "running", "fingerprint": f"{kind} {seed}"}  # as a run has it
        (folder / "stage.json").write_text(json.dumps(record))
        options = {
            "learning_rate": 1e-2,
            "batch": 4,
            "max_length": 16,
            "checkpoint_every": 1,
            "evaluate_every": 1,
            "log_every": 1,
            "seed": seed,
            "arguments": {"use_cpu": True, "lr_scheduler_type": "constant", "warmup_steps": 0},
        }
        source = StageSource(
            name="rows",
            train=_rows(16, 1, noise=False),
            validation=_rows(4, 3, noise=True),
            share=1.0,
            terms=LossTerms(next_token=NextToken()),
        )
        settings = TrainSettings(**options | KINDS[kind])
        student = Model(path=str(self.folder / "m"))
        train_stage(
            StageTraining(folder=folder, sources=[source], settings=settings),
            StageModels(student=student, tokenizer=word_tokenizer()),
            callbacks=[Kill(killed, JUMP if kind == "spike" else None)],
        )

    def cut(self, kind: str, killed: int | str, seed: int = 0) -> Path:
        """The folder of a stage that was killed; made once, not to be changed."""
        folder = self.folder / f"{kind}-{killed}-{seed}" / "s"
        if not folder.exists():
            try:
                self.train(kind, folder, killed=killed, seed=seed)
            except Killed:
                gc.freeze()  # accelerate collects after each stage; libraries need no look
                return folder
            raise AssertionError("it was to be killed")
        return folder

    def end(self, kind: str, folder: Path, *, killed: int | str | None = None) -> dict[str, Any]:
        """What a stage comes to: weights to the bit and metrics but for times, or the message."""
        try:
            self.train(kind, folder, killed=killed)
        except DominieError as error:
            assert not (folder / "model").exists(), "a refused stage has no model"
            broken = folder / "broken-step.json"
            told = json.loads(broken.read_text()) if broken.exists() else None
            return {"refused": str(error).replace(str(folder), "S"), "broken": told}
        weights = sorted((folder / "model").glob("*.safetensors"))
        assert weights
        lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        return {
            "weights": {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in weights},
            "metrics": [{k: v for k, v in line.items() if k not in _TIMES} for line in lines],
        }

    def good(self, kind: str) -> dict[str, Any]:
        """What it comes to when nothing disturbs it."""
        kept = self.folder / f"{kind}.json"
        if not kept.exists():
            kept.write_text(json.dumps(self.end(kind, self.folder / f"{kind}-whole" / "s")))
        return json.loads(kept.read_text())


def files(stage: Path) -> Iterator[Path]:
    """The files of a cut-off stage, relative to it."""
    for path in sorted(stage.rglob("*")):
        if path.is_file() and path.name != "stage.json":  # test_damage damages it
            yield path.relative_to(stage)


def older(stage: Path, file: Path) -> Path | None:
    """The same file of an earlier checkpoint, of a later one for the oldest."""
    steps = sorted(stage.glob("checkpoints/checkpoint-*"), key=lambda p: int(p.name[11:]))
    parts = file.parts
    if len(steps) < 2 or parts[0] != "checkpoints":
        return None
    here = steps.index(stage / parts[0] / parts[1])
    other = steps[here - 1] if here else steps[1]
    return other.joinpath(*parts[2:])


def same(found: dict[str, Any], good: dict[str, Any], *words: str) -> bool:
    """Whether a stage came to the same end; if not, it was refused with these words."""
    if found == good:
        return True
    told = found.get("refused")
    assert told, "silently another result"
    assert "refused" not in good or good["refused"] != told
    assert "\n  do  " in told, told
    assert "report this" not in told
    for word in words:
        assert word in told, (word, told)
    return False


Fault = Callable[[Path], object]


def copied_to(stage: Path, target: Path, *, moved: bool) -> Path:
    """A copy of a cut-off stage under its own name, or in another run of another project."""
    folder = target / ("elsewhere/runs/other/s" if moved else "s")
    shutil.copytree(stage, folder)
    return folder
