"""`dominie init --model`: a first recipe for a given model, fitted to it and to this machine."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dominie.core.hardware import Machine, machine
from dominie.models.info import ModelInfo, info_of
from dominie.models.spec import Model
from dominie.planning.plan import Plan, plan_recipe
from dominie.planning.sizes import load_plan_config, shape_of
from dominie.recipe.load import recipe_of
from dominie.recipe.yaml_text import parsed_yaml
from dominie.workflows.init import STAGES

#: The paper's rate for 7B in full.
_PAPER_RATE, _PAPER_SIZE = 2e-5, 7e9
_PARTS = 4  # of the longest conversation is a usual one's length taken to be

TEXT = """\
# Domain Alignment from Expert: {shown} learns a domain and forgets nothing.
#
#     dominie check recipe.yaml     reads the model, its template and every row; trains nothing
#     dominie run recipe.yaml       trains, scores, and writes runs/{name}/report.html
#
# It runs as it stands, on the example data beside it. Put your own at the arrows (<-). The settings
# are for this model on {machine}: for another machine, make another.
name: {name}

models:
  start: {model}
  # {known}

data:                         # JSONL, JSON, Parquet or a datasets id; see docs/data.md for layouts
  general: {{path: general.jsonl, validation_fraction: 0.1, test_fraction: 0.1}}   # <- instructions
  domain: {{path: domain.jsonl, validation_fraction: 0.1, test_fraction: 0.1}}     # <- your domain

train:
  precision: {precision}
  learning_rate: {rate}
{method}
  max_length: {length:<15} # tokens of the longest conversation; longer ones are cut
  batch: {batch:<20} # conversations a step; the paper's 256 wants data of a hundred thousand
  micro_batch: {micro_batch:<14} # of them in a forward pass: the most of 8, 2, 1 that fits
  steps: {steps:<20} # <- or epochs: 2, passes over the largest source
  # {time}

stages:
{stages}
evaluate:
  models: {{start: start, expert: expert, align: align}}
  tasks:                      # the held-out conversations; see docs/evaluation.md for other metrics
    general: {{source: general, metric: exact_match}}
    domain: {{source: domain, metric: exact_match}}
    forgotten: {{source: general, metric: forgetting}}   # KL(start ‖ model), in nats per token
"""


@dataclass(frozen=True)
class _Choice:
    """One way to train: in full or by adapters, and what saves memory."""

    lora: bool = False
    checkpointing: bool = False
    quantise: bool = False
    micro_batch: int = 8


def recipe_for(path: str, *, name: str) -> str:
    """Write the recipe of a model, as YAML.

    In full, if that fits into the memory of this machine, since it learns most; else by what gives
    up least: smaller forward passes, activations that are computed again, LoRA, 4 bits.

    Args:
        path: a folder, a GGUF file, or a hub id.
        name: of the run.

    Raises:
        InputError: no configuration of the model can be reached.
    """
    if Path(path).exists():
        path = str(Path(path).resolve())
    spec = Model(path=path)
    info, on = info_of(load_plan_config(spec), spec=spec), machine()
    for choice in _choices(on, shape_of(info.config).parameters):
        text, plan = _planned(info, choice, on, name)
        if plan.fits:
            break
    return text


def _choices(on: Machine, size: int) -> list[_Choice]:
    """The ways to train a model of so many weights, best first: those whose weights fit at all."""
    ways: list[tuple[float, dict[str, bool]]] = [  # bytes a weight: with AdamW, or frozen
        (4.0 if lora and on.device.is_cpu else 2.0 if lora else 16.0,
         {"lora": lora, "checkpointing": again})
        for lora in (False, True)
        for again in (False, True)
    ]  # fmt: skip
    if not on.device.is_cpu:
        ways.append((0.5, {"lora": True, "checkpointing": True, "quantise": True}))
    fitting = [way for least, way in ways if least * size <= on.memory]
    sizes = (8, 2, 1) if fitting else (1,)
    return [_Choice(**way, micro_batch=n) for way in fitting or [ways[-1][1]] for n in sizes]


def _planned(info: ModelInfo, choice: _Choice, on: Machine, name: str) -> tuple[str, Plan]:
    """The text for one choice, and its plan: all conversations as long as they may be."""
    cpu = on.device.is_cpu
    length = min(info.context or 2048, 512 if cpu else 2048)
    values = _values(info, choice, on, name) | {"length": length}
    text = TEXT.format(**values, time="")
    recipe = recipe_of(parsed_yaml(text, where="recipe.yaml"))
    plan = plan_recipe(recipe, on, conversations=10_000, tokens=length)
    hours = sum(stage.cost.hours for stage in plan.stages.values() if stage.cost) / _PARTS
    peak = max(stage.peak for stage in plan.stages.values()) / 1e9
    fit = "" if plan.fits else "; IT DOES NOT FIT: see dominie plan"
    time = f"{60 * hours:,.0f} min" if hours < 2 else f"{hours:,.0f} h"
    return TEXT.format(
        **values,
        time=f"planned here: {peak:.1f} GB of {on.memory / 1e9:.0f}; about {time}, if rows have "
        f"{length // _PARTS} tokens{fit}",
    ), plan


def _values(info: ModelInfo, choice: _Choice, on: Machine, name: str) -> dict[str, Any]:
    cpu, size = on.device.is_cpu, shape_of(info.config).parameters
    assert info.spec is not None
    shown = Path(info.spec.path).name
    model = f"{{path: {json.dumps(info.spec.path, ensure_ascii=False)}"
    model += ", quantize: 4bit}" if choice.quantise else "}"
    full = _round(_PAPER_RATE * (_PAPER_SIZE / size) ** 0.4)
    rate = _round(min(10 * full, 1e-2)) if choice.lora else min(full, 2e-3)
    if choice.lora:
        method = "  lora: {r: 16, alpha: 32}   # in full it does not fit: adapters over its weights"
    else:
        method = "  # lora: {r: 16, alpha: 32} # not needed: in full it fits, and learns more"
    if choice.checkpointing:
        method += "\n  gradient_checkpointing: true  # slower; without it, it does not fit"
    return {
        "name": name,
        "shown": shown,
        "machine": f"one {on.device.name} with {on.memory / 1e9:.0f} GB",
        "model": model,
        "known": _known(info, size),
        "precision": "fp32            # bf16 is slower on most CPUs"
        if cpu
        else "bf16            # half the memory and time of fp32; the weights stay fp32",
        "rate": f"{rate:.0e}".replace("e-0", "e-")
        + (
            "        # adapters want ten times the rate of all weights"
            if choice.lora
            else "        # 2e-5 is the paper's for 7B; smaller models want more"
        ),
        "method": method,
        "batch": 16 if cpu else 32,
        "micro_batch": choice.micro_batch,
        "steps": 30 if cpu else 200,
        "stages": "\n".join(
            STAGES[stage].replace("STUDENT", "start") for stage in ("expert", "align")
        ),
    }


def _known(info: ModelInfo, size: int) -> str:
    """What is known of the model, in a comment."""
    facts = [f"{size / 1e6:,.0f}M weights, {info.family}"]
    if info.context:
        facts.append(f"reads up to {info.context:,} tokens")
    if info.rounded:
        facts.append(f"rounded to {info.rounded} in the file")
    return "; ".join(facts)


def _round(rate: float) -> float:
    """To one digit."""
    digits = -math.floor(math.log10(rate))
    return round(rate, digits)
