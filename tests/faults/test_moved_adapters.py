"""An adapter and its base moved, copied, replaced, damaged: the same logits, or a refusal."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from faults import damage
from safetensors.torch import load_file, save_file
from tiny import tiny_folder

from dominie.core.display import Display
from dominie.core.errors import DominieError
from dominie.core.io import file_manifest
from dominie.models.loading import load_frozen, load_student
from dominie.models.model_folder import base_and_adapter, write_base
from dominie.models.spec import Model
from dominie.stages.run_folder import check_whole
from dominie.training.settings import Lora

ADAPTER = Path("runs/r/s/model")


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> SimpleNamespace:
    """A base and an adapter over it, named by paths that begin in the project, and its logits."""
    folder = tmp_path_factory.mktemp("adapters") / "project"
    tiny_folder(folder / "m", num_hidden_layers=1)
    tiny_folder(folder / "other", num_hidden_layers=1, seed=1)
    before = Path.cwd()
    os.chdir(folder)
    try:
        student = load_student(Model(path="m"), lora=Lora(r=2, merge=False))
        for weight in student.parameters():
            if weight.requires_grad:
                weight.data += 0.1
        student.save_pretrained(ADAPTER)
        write_base(ADAPTER, "m")
    finally:
        os.chdir(before)
    return SimpleNamespace(folder=folder, logits=logits(folder / ADAPTER))


def logits(adapter: Path) -> torch.Tensor:
    with torch.no_grad():
        return load_frozen(Model(path=str(adapter)))(input_ids=torch.arange(8)[None]).logits


@pytest.fixture
def project(made, tmp_path, monkeypatch) -> Path:
    """A copy, written where the base's absolute path in it leads to the copy, too."""
    folder = tmp_path / "project"
    shutil.copytree(made.folder, folder)
    config = folder / ADAPTER / "adapter_config.json"
    text = config.read_text().replace(str(made.folder), str(folder))
    config.write_text(text)
    monkeypatch.chdir(folder)
    return folder


def replace_weights(base: Path, *, times: bool) -> None:
    file = base / "model.safetensors"
    before, weights = file.stat(), load_file(file)
    weights["model.norm.weight"] *= 1.5
    save_file(weights, file, metadata={"format": "pt"})
    if times:
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def configure(base: Path, **values: Any) -> None:
    file = base / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def put(source: Path, target: Path) -> None:
    shutil.rmtree(target)
    shutil.copytree(source, target)


def link(project: Path) -> None:
    (project / "m").rename(project / "n")
    (project / "m").symlink_to(project / "n")


#: What is done to the project; where the adapter is then, if it was moved.
CHANGES: dict[str, Callable[[Path], Any]] = {
    "nothing": lambda p: None,
    "project moved": lambda p: p.rename(p.parent / "q") / ADAPTER,
    "project copied": lambda p: Path(shutil.copytree(p, p.parent / "q")) / ADAPTER,
    "run moved": lambda p: (p / "runs/r").rename(p / "runs/kept") / "s/model",
    "run moved away": lambda p: (p / "runs/r").rename(p.parent / "kept") / "s/model",
    "stage renamed": lambda p: (p / "runs/r/s").rename(p / "runs/r/t") / "model",
    "adapter copied": lambda p: Path(shutil.copytree(p / ADAPTER, p / "a")),
    "adapter in its base": lambda p: Path(shutil.copytree(p / ADAPTER, p / "m/a")),
    "base behind a link": link,
    "base copied back": lambda p: put(Path(shutil.copytree(p / "m", p / "n")), p / "m"),
    "base touched": lambda p: os.utime(p / "m/model.safetensors"),
    "a card beside the base": lambda p: (p / "m/README.md").write_text("# m"),
    "base moved": lambda p: (p / "m").rename(p / "n"),
    "base moved, run moved": lambda p: (
        (p / "m").rename(p / "n") and (p / "runs/r").rename(p.parent / "kept") / "s/model"
    ),
    "base lost": lambda p: shutil.rmtree(p / "m"),
    "base a file": lambda p: (shutil.rmtree(p / "m"), (p / "m").write_text("m")),
    "base emptied": lambda p: (shutil.rmtree(p / "m"), (p / "m").mkdir()),
    "another model there": lambda p: put(p / "other", p / "m"),
    "another model behind a link": lambda p: (
        (p / "m").rename(p / "n") and (p / "m").symlink_to(p / "other")
    ),
    "other weights": lambda p: replace_weights(p / "m", times=False),
    "other weights, times kept": lambda p: replace_weights(p / "m", times=True),
    "a bit of the weights": lambda p: damage(p / "m/model.safetensors", "flip", 0.9),
    "weights cut off": lambda p: damage(p / "m/model.safetensors", "cut", 0.9),
    "weights lost": lambda p: (p / "m/model.safetensors").unlink(),
    "weights renamed": lambda p: (p / "m/model.safetensors").rename(p / "m/w.safetensors"),
    "more weights": lambda p: shutil.copy(p / "other/model.safetensors", p / "m/x.safetensors"),
    "config lost": lambda p: (p / "m/config.json").unlink(),
    "another rope": lambda p: configure(p / "m", rope_parameters={"rope_theta": 100.0}),
    "another norm": lambda p: configure(p / "m", rms_norm_eps=0.1),
    "another window": lambda p: configure(p / "m", sliding_window=2),
    "another activation": lambda p: configure(p / "m", hidden_act="gelu"),
    "other heads": lambda p: configure(p / "m", num_attention_heads=4, head_dim=8),
}
FEW = {"project moved", "base moved", "other weights, times kept", "another norm"}


@pytest.mark.parametrize(
    "change", [c if c in FEW else pytest.param(c, marks=pytest.mark.full) for c in CHANGES]
)
@pytest.mark.parametrize("named", ["absolute", pytest.param("relative", marks=pytest.mark.full)])
def test_adapter_and_base(made, project, monkeypatch, tally, change, named):
    there = CHANGES[change](project)
    moved = isinstance(there, Path) and (there / "adapter_config.json").is_file()
    adapter = there if moved else project / ADAPTER
    monkeypatch.chdir("/" if named == "absolute" else adapter.parent)
    if named == "relative":
        adapter = Path(adapter.name)
    ended = same(made, adapter)
    if change != "nothing":
        tally("adapter and base", same=ended)


def same(made: SimpleNamespace, adapter: Path) -> bool:
    try:
        found = logits(adapter)
    except DominieError as error:
        told = str(error)
    else:
        assert torch.equal(found, made.logits), "silently another model"
        return True
    assert str(adapter) in told or "/m" in told, told
    return False


@pytest.mark.full
def test_every_character_of_what_names_the_base(made, project, tally):
    """The adapter's own weights and configuration are known by the stage's record alone."""
    file, base = project / ADAPTER / "base_model.json", (project / "m").resolve()
    content = file.read_bytes()
    for at in range(0, len(content), 2):
        for kind, damaged in (
            ("a bit", content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]),
            ("cut off", content[:at]),
        ):
            file.write_bytes(damaged)
            try:
                found = base_and_adapter(Model(path=str(ADAPTER)))[0]
            except DominieError as error:
                told = str(error)
            else:
                assert Path(found).resolve() == base, "another base"
                told = ""
            assert not told or str(ADAPTER) in told
            tally(f"base_model.json: {kind}", same=not told)


@pytest.mark.full
@pytest.mark.parametrize("how", ["flip", "cut", "empty", "delete"])
def test_every_file_of_a_finished_adapter(project, tally, how):
    stage = project / ADAPTER.parent
    record = {"files": file_manifest(stage)}
    check_whole(stage, record, Display())
    for name in record["files"]:
        kept = (stage / name).read_bytes()
        damage(stage / name, how)
        with pytest.raises(DominieError, match=Path(name).name):
            check_whole(stage, record, Display())
        (stage / name).write_bytes(kept)
        tally(f"adapter's files: {how}", same=False)
