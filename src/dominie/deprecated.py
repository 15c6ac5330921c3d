"""Old module paths and names, kept for one release; each use says what to write instead."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, cast

#: Old module: the module that has its names now.
MOVED = {
    "dominie.data.batches": "dominie.data.batch",
    "dominie.data.splits": "dominie.data.sources",
    "dominie.data.store": "dominie.data.row_store",
    "dominie.data.templates": "dominie.data.tokenization",
    "dominie.evaluation.extraction": "dominie.evaluation.answer_text",
    "dominie.evaluation.overlap": "dominie.evaluation.answer_text",
    "dominie.models.capture": "dominie.models.attention_capture",
    "dominie.models.minds": "dominie.teachers.teacher",
    "dominie.training.learner": "dominie.training.loss_forward",
}
#: Old name: its name now, in whichever module.
RENAMED = {
    "Lesson": "DistillationInputs",
    "Mind": "AdapterTeacher",
    "extracted": "extract",
    "pairs": "attribute_pairs",
    "teaching": "loss_in_forward",
}


class OldModules:
    """Imports an old module path as an empty module that looks names up in the new one."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """A module of ours, if the name is an old path."""
        return ModuleSpec(fullname, cast("Any", self)) if fullname in MOVED else None

    def create_module(self, spec: ModuleSpec) -> None:
        """Python makes the module."""

    def exec_module(self, module: ModuleType) -> None:
        """Give the module a `__getattr__` and nothing else."""
        new = MOVED[module.__name__]

        def lookup(name: str) -> Any:
            if name.startswith("__"):
                raise AttributeError(name)
            now = RENAMED.get(name, name)
            found = getattr(import_module(new), now)
            _warn(f"{module.__name__}.{name}", f"from {new} import {now}")
            return found

        vars(module)["__getattr__"] = lookup


def renamed(package: str, names: Mapping[str, str]) -> Any:
    """A `__getattr__` for a package some of whose names have changed."""

    def lookup(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        _warn(f"{package}.{name}", f"from {package} import {names[name]}")
        return getattr(sys.modules[package], names[name])

    return lookup


def _warn(old: str, instead: str) -> None:
    warnings.warn(
        f"{old} is deprecated and goes with the next release: write `{instead}`",
        DeprecationWarning,
        stacklevel=4,
    )
