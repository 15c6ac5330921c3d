"""The real run in miniature: real problems, the real tokenizer, the shipped recipe, two steps."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mistral_common", reason="the tokenizer comes from mistral-common")
pytest.importorskip("sentencepiece", reason="the tokenizer is read with sentencepiece")

ROOT = Path(__file__).parents[1]
PREPARE = ROOT / "examples" / "real_run" / "prepare.py"
RECIPE = ROOT / "recipes" / "real-run.yaml"
PROBLEMS = Path(
    os.environ.get(
        "DOMINIE_GSM8K", ROOT.parent / "shared" / "data" / "general" / "gsm8k_train.json"
    )
)
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
ROWS = 150

pytestmark = pytest.mark.skipif(
    not PROBLEMS.is_file(), reason=f"no problems at {PROBLEMS}; set DOMINIE_GSM8K to the file"
)


def python(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(
        command, cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """The folder that prepare.py makes of the first problems."""
    folder = tmp_path_factory.mktemp("real_run")
    python(PREPARE, PROBLEMS, folder, "--rows", ROWS, cwd=folder)
    return folder


def test_every_problem_is_in_one_part_and_money_only_in_its_own(prepared):
    parts = {
        name: [json.loads(line) for line in (prepared / f"{name}.jsonl").read_text().splitlines()]
        for name in ("general", "money")
    }
    together = [row["instruction"] for rows in parts.values() for row in rows]
    problems = json.loads(PROBLEMS.read_text())[:ROWS]
    assert sorted(together) == sorted(row["instruction"] for row in problems)
    texts = {name: [row["instruction"] + row["output"] for row in parts[name]] for name in parts}
    assert not any("$" in text or "dollar" in text.lower() for text in texts["general"])
    assert sum("$" in text for text in texts["money"]) > 0.8 * len(texts["money"]) > 10


def test_the_tokenizer_is_the_real_one(prepared):
    import mistral_common
    from sentencepiece import SentencePieceProcessor
    from transformers import AutoTokenizer

    file = Path(mistral_common.__file__).parent / "data" / "tokenizer.model.v1"
    pieces = SentencePieceProcessor(str(file))
    tokenizer = AutoTokenizer.from_pretrained(prepared / "student")
    assert len(tokenizer) == pieces.get_piece_size() == 32_000
    for row in json.loads(PROBLEMS.read_text())[:ROWS]:
        for text in (row["instruction"], row["output"]):
            assert tokenizer(text, add_special_tokens=False)["input_ids"] == pieces.encode(text)


def test_the_recipe_runs_through(prepared, tmp_path):
    small = [
        *(f"models.{name}.path={prepared / kind}" for name, kind in
          (("mixtral", "teacher"), ("mistral", "student"))),
        *(f"data.{name}.path={prepared / name}.jsonl" for name in ("general", "money")),
        *(f"data.{name}.{split}_fraction=0.2" for name in ("general", "money")
          for split in ("validation", "test")),
        *(f"stages.{stage}.train.steps=2" for stage in ("teacher", "expert", "align")),
        *("train.steps=2", "train.batch=4", "train.micro_batch=4", "train.evaluate_rows=4"),
        "evaluate.models={teacher: teacher, align: align}",
        *(f"evaluate.tasks.{task}.limit=4" for task in ("general", "money", "answers")),
        "evaluate.tasks.answers.max_new_tokens=4",
    ]  # fmt: skip
    python("-m", "dominie", "run", RECIPE, *small, cwd=tmp_path)
    run = tmp_path / "runs" / "real-run"
    for stage in ("teacher", "distill", "logits-only", "expert", "align"):
        lines = [json.loads(x) for x in (run / stage / "metrics.jsonl").read_text().splitlines()]
        losses = [line["loss"] for line in lines]
        assert lines[-1]["step"] == 2
        assert losses
        assert all(math.isfinite(loss) for loss in losses)
    (aligned,) = [
        line["sources"]
        for line in map(json.loads, (run / "align" / "metrics.jsonl").read_text().splitlines())
        if line["step"] == 2 and "sources" in line
    ]
    assert set(aligned) == {"general", "money"}
    results = json.loads((run / "results.json").read_text())
    assert results["teacher"]["general"]["kl"] == pytest.approx(0.0, abs=1e-6)
    assert results["align"]["general"]["kl"] > 0
    # Two steps of so small a rate leave a model near uniform over 32,000 pieces.
    assert results["align"]["general"]["loss"] == pytest.approx(math.log(32_000), abs=1.0)
