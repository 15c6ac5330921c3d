"""What has changed under a half-trained stage is named; what changes no result does not matter."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from faults import complaint, copied, wrong


def edit_data(work: Path) -> None:
    rows = (work / "d.jsonl").read_text().replace('"red"', '"blue"', 9)
    (work / "d.jsonl").write_text(rows)


def reorder_data(work: Path) -> None:
    rows = (work / "d.jsonl").read_text().splitlines()
    (work / "d.jsonl").write_text("\n".join(reversed(rows)) + "\n")


def edit_template(work: Path) -> None:
    template = work / "m" / "chat_template.jinja"
    template.write_text(template.read_text().replace("{%", "{#- another -#}{%", 1))


def edit_weights(work: Path) -> None:
    weights = work / "m" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-3] ^= 1
    weights.write_bytes(content)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["stages.second.train.learning_rate=2e-3"], ["train.learning_rate: 0.001 before, 0.002"]),
        (edit_data, ["data.d.rows: other conversations"]),
        (edit_template, ["tokenizer: another tokenizer or chat template"]),
        *(
            pytest.param(*case, marks=pytest.mark.full)
            for case in (
                (["stages.second.train.batch=4"], ["train.batch: 2 before, 4 now"]),
                (["stages.second.train.seed=1"], ["train.seed: 0 before, 1 now"]),
                (
                    ["stages.second.loss.prediction.temperature=2.0"],
                    ["prediction.temperature: 1.0 before, 2.0 now"],
                ),
                (["stages.first.train.seed=1"], ["data.d.teacher: another model"]),
                (reorder_data, ["data.d.rows", "another order"]),
                (edit_weights, ["student: another model, or other weights"]),
            )
        ),
    ],
)
def test_a_half_trained_stage_is_refused(
    nursery, state: Callable[[str], Path], undisturbed, tmp_path, change, words
):
    work = copied(state("training"), tmp_path / "work")
    overrides = change if isinstance(change, list) else []
    if callable(change):
        kept = {path: path.read_bytes() for path in work.rglob("*") if path.is_file()}
        change(work)
    refused = nursery.run(work, "run", "r.yaml", *overrides)
    assert not complaint(refused, ["runs/tiny/second", *words, "checkpoint-2", "move"])
    assert refused.steps == 0, "nothing is trained before it is refused"
    if callable(change):  # put back, it goes on
        for path, content in kept.items():
            path.write_bytes(content)
    again = nursery.run(work)
    assert not wrong(again, work / "runs" / "tiny", undisturbed.outcome)
    assert again.steps == 2


@pytest.mark.full
def test_moved_away_it_is_trained_anew(nursery, state, tmp_path):
    work = copied(state("training"), tmp_path / "work")
    (work / "runs" / "tiny" / "second").rename(tmp_path / "second")
    ended = nursery.run(work, "run", "r.yaml", "stages.second.train.seed=1")
    assert ended.status == 0, ended.said
    assert ended.steps == 4


def test_what_changes_no_result_goes_on(nursery, state, undisturbed, tmp_path):
    work = copied(state("training"), tmp_path / "elsewhere")  # another path to everything
    (work / "m").rename(work / "n")
    (work / "d.jsonl").rename(work / "e.jsonl")
    recipe = (work / "r.yaml").read_text()
    renamed = recipe.replace("student: m", "student: n").replace("d.jsonl", "e.jsonl")
    (work / "s.yaml").write_text(renamed)
    harmless = [
        "train.checkpoint_every=1",
        "train.run_name=other",
        "train.dataloader_num_workers=1",
    ]
    ended = nursery.run(work, "run", "s.yaml", *harmless)
    assert ended.steps == 2
    assert not wrong(ended, work / "runs" / "tiny", undisturbed.outcome)


def test_other_ranks_and_versions_are_told(nursery, state, undisturbed, tmp_path):
    from dominie.core.io import read_checksummed, write_checksummed

    work = copied(state("training"), tmp_path / "work")
    file = work / "runs" / "tiny" / "second" / "stage.json"
    record = read_checksummed(file)
    assert json.loads(file.read_text())["checksum"]
    write_checksummed(
        file, record | {"ranks": 2, "versions": {**record["versions"], "torch": "2.0"}}
    )
    ended = nursery.run(work)
    assert "goes on with ranks 1 (begun with 2), torch " in ended.said
    assert not wrong(ended, work / "runs" / "tiny", undisturbed.outcome)
