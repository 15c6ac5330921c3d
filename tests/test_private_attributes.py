"""Every private attribute of torch, transformers and accelerate that the package leans on, by name.

Nothing else promises that these stay. If an upgrade takes one away, this fails first, in words; and
a use that is not listed here fails as well.
"""

from __future__ import annotations

import ast
import inspect
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_model
from transformers import Trainer

PACKAGE = Path(__file__).parents[1] / "src" / "dominie"

#: Methods of transformers.Trainer that the package overrides or calls, and what for.
TRAINER = {
    "_save_checkpoint": "a checkpoint is sealed and renamed when it is whole",
    "_save_optimizer_and_scheduler": "the optimiser's state is hashed while it is written",
    "_load_from_checkpoint": "a mixture's experts are restored by from_pretrained",
    "_load_best_model": "the best checkpoint is verified, a mixture's experts restored",
    "_load_callback_state": "patience and the losses before a jump are restored in place",
    "_get_grad_norm": "a step that is not finite is stopped before the optimiser",
}

#: Attributes by where they are found, and what for.
ATTRIBUTES = {
    ("accelerate.state:AcceleratorState", "_reset_state"): "a run begins processes anew",
    (
        "accelerate.commands.launch",
        "_validate_launch_command",
    ): "`--engine FILE` is read as accelerate does",
    ("torch", "_subclasses"): "the planner runs a model on tensors without storage",
    ("torch.utils", "_python_dispatch"): "the planner sees every operation",
    ("torch.utils", "_pytree"): "the planner finds the tensors among arguments",
    ("torch.ops.aten", "_to_copy"): "the planner tells a cast from other operations",
    ("torch.ops.aten", "_grouped_mm"): "the planner gives grouped products a shape",
    ("transformers:MistralConfig", "_attn_implementation"): "attention goes through our hook",
}
#: Attributes of objects, looked at on a tiny model.
OF_MODELS = {
    "_parameters": "weights are replaced one by one",
    "_buffers": "the planner counts them",
    "_can_record_outputs": "routers are found by it",
    "_supports_flash_attn": "packed rows are attended by conversation where windows come along",
    "_is_stateful": "and no recurrence reads the mask",
}
OF_CONFIGS = {
    "_attn_implementation": "attention goes through our hook",
    "_experts_implementation": "experts under autocast",
    "_name_or_path": "messages name the model",
}
#: Used if they are there, else done without.
OPTIONAL = {
    "_linear_pointwise": "a faster product on a CPU",
    "_apply_gate": "the gated products of a frozen mixture's experts are compiled",
}
#: Private names that are Python's own or the package's.
OURS = {"_replace", "_exit"}


@pytest.mark.parametrize("name", TRAINER)
def test_the_trainer_has_the_methods_that_are_overridden(name):
    assert callable(getattr(Trainer, name, None)), f"transformers.Trainer.{name}: {TRAINER[name]}"


@pytest.mark.parametrize(("place", "name"), ATTRIBUTES)
def test_an_attribute_is_where_it_was(place, name):
    module, _, inner = place.partition(":")
    if module.startswith("torch.ops"):
        home: Any = torch.ops.aten
    else:
        home = import_module(module)
        home = getattr(home, inner) if inner else home
    if name.startswith("_") and inner.endswith("Config"):
        home = home()
    if not hasattr(home, name):
        import_module(f"{module}.{name}")  # a module that nobody has imported yet


@pytest.mark.parametrize("name", OF_MODELS)
def test_a_model_has_the_attribute(name):
    model = tiny_model("mixtral")
    assert hasattr(model.model, name), f"{name} of a model: {OF_MODELS[name]}"


@pytest.mark.parametrize("name", OF_CONFIGS)
def test_a_configuration_has_the_attribute(name):
    config = tiny_model("mixtral").config
    assert hasattr(config, name), f"{name} of a configuration: {OF_CONFIGS[name]}"


def test_every_use_is_listed():
    known = {name for _, name in ATTRIBUTES} | {*OF_MODELS, *OF_CONFIGS, *OPTIONAL, *OURS}
    found: dict[str, str] = {}
    for path in PACKAGE.rglob("*.py"):
        for name in foreign_private_names(path):
            found.setdefault(name, str(path.relative_to(PACKAGE)))
    unlisted = {name: file for name, file in found.items() if name not in known}
    assert not unlisted, "list them above, with what they are for"
    assert set(known) - set(found) <= {"_exit"}, "these are used no longer"


def test_every_override_of_the_trainer_is_listed():
    import dominie.training.trainer as module

    classes = [c for c in module.DistillationTrainer.__mro__ if c.__module__.startswith("dominie")]
    overridden = {
        name
        for each in classes
        for name, value in vars(each).items()
        if inspect.isfunction(value) and name.startswith("_") and hasattr(Trainer, name)
    }
    assert overridden - {"__init__"} == set(TRAINER)


def foreign_private_names(path: Path) -> set[str]:
    """Private attributes read from anything but `self` and `cls`, modules and texts included."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    own = {
        name.attr if isinstance(name, ast.Attribute) else name.name
        for name in ast.walk(tree)
        if (isinstance(name, ast.FunctionDef) and name.name.startswith("_"))
        or (
            isinstance(name, ast.Attribute)
            and isinstance(name.value, ast.Name)
            and name.value.id in ("self", "cls")
        )
    }
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            if not (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")):
                found.add(node.attr)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [each.name for each in node.names]
            found |= {*node.module.split("."), *([] if "dominie" in node.module else names)}
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("getattr", "hasattr"):
            names = [a.value for a in node.args[1:2] if isinstance(a, ast.Constant)]
            found |= {name for name in names if isinstance(name, str)}
    return {n for n in found - own if n.startswith("_") and not n.startswith("__")}
