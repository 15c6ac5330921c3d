"""An adapter finds its base wherever both are, and takes no other model for it."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_folder

from dominie.core.errors import InputError
from dominie.models.info import describe
from dominie.models.loading import load_frozen, load_student
from dominie.models.model_folder import base_and_adapter, write_base
from dominie.models.spec import Model
from dominie.training.settings import Lora

LORA = Lora(r=2, merge=False)


@pytest.fixture
def project(tmp_path, monkeypatch) -> Path:
    """A base, and an adapter in a run folder, written from within by paths that begin there."""
    folder = tmp_path / "project"
    tiny_folder(folder / "m")
    monkeypatch.chdir(folder)
    student = load_student(Model(path="m"), lora=LORA)
    for weight in student.parameters():
        if weight.requires_grad:
            weight.data += 0.1
    student.save_pretrained("runs/r/s/model")
    write_base(Path("runs/r/s/model"), "m")
    return folder


def logits(folder: Path | str) -> torch.Tensor:
    with torch.no_grad():
        return load_frozen(Model(path=str(folder)))(input_ids=torch.arange(8)[None]).logits


@pytest.mark.parametrize("moved", ["nothing", "the project", "the run", "the place"])
def test_the_base_is_found_from_anywhere(project, tmp_path, monkeypatch, moved):
    expected = logits("runs/r/s/model")
    adapter = project / "runs/r/s/model"
    if moved == "the project":
        project.rename(tmp_path / "other")
        adapter = tmp_path / "other/runs/r/s/model"
    elif moved == "the run":
        (project / "runs/r").rename(tmp_path / "kept")
        adapter = tmp_path / "kept/s/model"
    monkeypatch.chdir("/")
    assert torch.equal(logits(adapter), expected)
    student = load_student(Model(path=str(adapter)), lora=LORA)
    found = student.eval()(input_ids=torch.arange(8)[None]).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_others_load_it_from_anywhere(project, monkeypatch):
    from peft import AutoPeftModelForCausalLM

    expected = logits("runs/r/s/model")
    monkeypatch.chdir("/")
    model = AutoPeftModelForCausalLM.from_pretrained(project / "runs/r/s/model").eval()
    with torch.no_grad():
        found = model(input_ids=torch.arange(8)[None]).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def changed(folder: Path) -> None:
    """Other weights under the same names, sizes and times."""
    file = folder / "model.safetensors"
    before = file.stat()
    weights = load_file(file)
    weights["model.norm.weight"] *= 1.5
    save_file(weights, file, metadata={"format": "pt"})
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_another_model_at_that_path_is_refused(project):
    spec = Model(path="runs/r/s/model")
    before = describe(spec).identity()
    changed(project / "m")
    for use in (load_frozen, describe, base_and_adapter, lambda s: load_student(s, lora=LORA)):
        with pytest.raises(InputError, match=r"(?s)over another model.*others in.*base_model.json"):
            use(spec)
    with pytest.raises(InputError, match="over another model"):
        base_and_adapter(Model(path="m", adapter="runs/r/s/model"))
    (project / "runs/r/s/model/base_model.json").unlink()  # on purpose
    base, adapter = base_and_adapter(spec)
    assert (Path(base), adapter) == (project / "m", "runs/r/s/model")
    assert describe(spec).identity() != before


def test_a_copy_is_taken_where_the_base_was_replaced(project):
    shutil.copytree("m", "copy")
    changed(project / "m")
    assert base_and_adapter(Model(path="copy", adapter="runs/r/s/model"))[0] == "copy"
    config = Path("runs/r/s/model/adapter_config.json")
    text = json.loads(config.read_text())
    config.write_text(json.dumps({**text, "base_model_name_or_path": str(project / "copy")}))
    assert base_and_adapter(Model(path="runs/r/s/model"))[0] == "copy"


def test_a_missing_base_is_named_and_a_published_one_accepted(project):
    shutil.rmtree("m")
    spec = Model(path="runs/r/s/model")
    with pytest.raises(InputError, match=rf"(?s)base is missing.*nothing at {project}/m"):
        base_and_adapter(spec)
    config = Path("runs/r/s/model/adapter_config.json")
    text = json.loads(config.read_text())
    config.write_text(json.dumps({**text, "base_model_name_or_path": "me/base"}))
    assert base_and_adapter(spec) == ("me/base", "runs/r/s/model")


def test_an_adapter_of_another_program_changes_with_its_base(project):
    (project / "runs/r/s/model/base_model.json").unlink()
    before = describe(Model(path="runs/r/s/model")).identity()
    changed(project / "m")
    assert describe(Model(path="runs/r/s/model")).identity() != before


def test_damage_of_what_was_written_down_is_no_licence(project):
    Path("runs/r/s/model/base_model.json").write_text("{")
    with pytest.raises(InputError, match=r"base_model\.json"):
        base_and_adapter(Model(path="runs/r/s/model"))
