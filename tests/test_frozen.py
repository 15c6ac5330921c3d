"""What must not change when the code is rearranged: fingerprints, weights, scores.

A change here makes every finished stage of every user train again: raise `FORMAT` in
`stages/fingerprint.py` with it, say so in the changelog, and freeze the new values.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
from pathlib import Path

import pytest
import torch

import dominie
from dominie.recipe import load_recipe
from dominie.stages.fingerprint import digest, making_parts, training_parts

RECIPES = Path(__file__).parent / "recipes"
#: Of tests/recipes/five.yaml, with stand-ins for what depends on versions of libraries.
FINGERPRINTS = {
    "distill": "803440d6d90f3455",
    "expert": "c0efd5403e72a7c1",
    "merged": "39394b2c2391d2d5",
    "mixture": "f3cb529446617a31",
    "align": "39e79a285cd809d2",
}
#: Of tests/recipes/mini.yaml, and where its bits are these: float32 sums differ by processor.
MADE_WITH = {
    "torch": "2.13.0",
    "transformers": "5.23.0",
    "tokenizers": "0.23.3",
    "cpu": "Intel(R) Xeon(R) Processor",
}
STAGES = {  # fingerprint, and the start of the SHA-256 of model.safetensors
    "teacher": ("4f395049770c07ff", "43e79315ad4aed54"),
    "sft": ("5b6b0d8ad842b79b", "5f5df8ab2e03b235"),
    "distill": ("c793d38332d34ea3", "eb6f6304e0514158"),
    "expert": ("b75df77d4004ea0a", "9abec6225dc429dc"),
    "merged": ("c43663491d1b26d8", "9c74bc44fc66258f"),
    "align": ("cf9b2b9830f00338", "74f459a391dcc247"),
}
RESULTS = "8f5bf6e37538f27c"
SCORES = "27a2a853d3d56d78"  # the same without the rates of cut and empty answers, as before them


def test_fingerprints_of_five_stages():
    recipe = load_recipe(RECIPES / "five.yaml")
    models = {n: f"model {n}" for n in (*recipe.models, "toyworld:student", *recipe.stages)}
    found = {}
    for name, stage in recipe.stages.items():
        if name in recipe.trained:
            rows = {source: f"rows {source}" for source in stage.active}
            parts = training_parts(recipe, name, rows=rows, models=models)
        else:
            parts = making_parts(recipe, name, models, "rows general" if stage.sources else None)
        found[name] = digest(*parts)
    assert found == FINGERPRINTS


def test_weights_and_scores_of_the_mini_recipe_to_the_bit(tmp_path):
    here = {name: importlib.metadata.version(name) for name in MADE_WITH if name != "cpu"}
    here["torch"] = here["torch"].partition("+")[0]
    here["cpu"] = processor()
    if apart := {name: found for name, found in here.items() if found != MADE_WITH[name]}:
        pytest.skip(f"frozen with {MADE_WITH}, here {apart}")
    torch.set_num_threads(1)
    run = dominie.run(RECIPES / "mini.yaml", runs=tmp_path)
    found = {}
    for name in STAGES:
        record = json.loads((run.folder / name / "stage.json").read_text("utf-8"))
        weights = run.folder / name / "model" / "model.safetensors"
        found[name] = (record["fingerprint"], hashlib.sha256(weights.read_bytes()).hexdigest()[:16])
    assert found == STAGES
    results = (run.folder / "results.json").read_bytes()
    scores = json.loads(results)
    for result in (result for tasks in scores.values() for result in tasks.values()):
        result.pop("cut", None)
        result.pop("empty", None)
    alone = json.dumps(scores, indent=1).encode()
    assert hashlib.sha256(alone).hexdigest()[:16] == SCORES
    assert hashlib.sha256(results).hexdigest()[:16] == RESULTS


def processor() -> str:
    """The name of the processor as Linux has it, else its family."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text("utf-8").splitlines() if path.exists() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor())
