"""One base under several adapters: which teachers share the student's, and adapters merged."""

from __future__ import annotations

import contextlib
import importlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor

from dominie.models.info import ModelInfo
from dominie.models.spec import Model

#: Ways to begin an adapter that leave the base as it is; others change it as they are loaded.
_PLAIN_BEGINNINGS = (True, False, "gaussian")


@dataclass(frozen=True)
class SharedBase:
    """Which teachers need no weights of their own beside the student's base.

    Attributes:
        adapters: by the teacher's name its adapter (a folder, or the stage that writes it), None
            for the base alone.
        apart: why other teachers over that base are loaded a second time, by name.
    """

    adapters: Mapping[str, str | None]
    apart: Mapping[str, str]


def shared_base(
    student: ModelInfo,
    teachers: Mapping[str, ModelInfo],
    *,
    lora: Any,
    precision: str,
    sharded: bool = False,
) -> SharedBase:
    """Find the teachers that share the base of a student under LoRA.

    Those are the very model the student starts from, and adapters over the student's base, if they
    would be placed and rounded alike by themselves. Training and planning both ask this.

    Args:
        student: the model that is trained.
        teachers: by name.
        lora: the stage's `dominie.training.settings.Lora`, None if every weight is trained.
        precision: `fp32`, `bf16` or `fp16`: dtype of the base under LoRA.
        sharded: whether the student's weights are sharded, which teachers cannot run on.
    """
    adapters: dict[str, str | None] = {}
    apart: dict[str, str] = {}
    if lora is None or sharded:
        return SharedBase(adapters, apart)
    merged = student.adapter if lora.merge else None  # one that goes on being trained is not merged
    for name, teacher in teachers.items():
        if teacher.base is None or _place(teacher.base) != _place(student.base):
            continue
        adapter = teacher.adapter
        if _place(adapter) == _place(merged):
            adapter = None
        elif adapter is None or merged is not None:
            apart[name] = "the student's weights hold an adapter that it lacks"
            continue
        reason = _placed_otherwise(student.spec, teacher, precision)
        if reason is None and adapter is not None and teacher.origin != "stage":
            reason = _no_plain_lora(adapter)
        if reason:
            apart[name] = reason
        else:
            adapters[name] = adapter
    return SharedBase(adapters, apart)


def _place(path: str | None) -> str | None:
    return str(Path(path).resolve()) if path and Path(path).exists() else path


def _placed_otherwise(student: Model | None, teacher: ModelInfo, precision: str) -> str | None:
    """Why a teacher is not loaded as the student's base is; None if it is."""
    if student is None or teacher.spec is None:
        return "it is not loaded here"
    if student.revision != teacher.spec.revision:
        return "its revision is not the student's"
    if student.attention != teacher.spec.attention:
        return "its attention is not the student's"
    if student.placed != teacher.spec.placed:
        return "its placement is not the student's"
    if teacher.spec.map_tokens:
        return "it has other token ids"
    if teacher.dtype != precision:
        return f"its weights are {teacher.dtype or 'of an unknown dtype'}, the base's {precision}"
    return None


def _no_plain_lora(adapter: str) -> str | None:
    """Why an adapter in a folder cannot lie beside the student's; None if it can."""
    try:
        config = json.loads((Path(adapter) / "adapter_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return "its adapter is not a folder here"
    plain = (
        config.get("peft_type") == "LORA"
        and config.get("bias", "none") == "none"
        and config.get("init_lora_weights", True) in _PLAIN_BEGINNINGS
    )
    return None if plain else "its adapter is no plain LoRA"


def merged(model: Any) -> tuple[Any, dict[str, Tensor]]:
    """The model without its adapters, their products added to its weights, and the weights, whole.

    Every process has to call this: weights that an engine has cut up are gathered from all.

    Args:
        model: under peft adapters, out of the engine's wrapper.
    """
    cut = [parameter for parameter in model.parameters() if hasattr(parameter, "ds_id")]
    with _whole(cut):
        plain = model.merge_and_unload()
        state = plain.state_dict()
        state = {name: _gathered(tensor, copied=bool(cut)) for name, tensor in state.items()}
    return plain, state


def _whole(cut: list[Any]) -> contextlib.AbstractContextManager[object]:
    """Within, parameters that DeepSpeed has cut up are whole."""
    if not cut:
        return contextlib.nullcontext()
    zero = importlib.import_module("deepspeed").zero
    found: contextlib.AbstractContextManager[object] = zero.GatheredParameters(cut)
    return found


def _gathered(tensor: Tensor, *, copied: bool) -> Tensor:
    if isinstance(tensor, DTensor):
        return tensor.full_tensor().cpu()
    return tensor.clone() if copied else tensor
