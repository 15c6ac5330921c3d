"""Adapters over one base: student and teachers share weights; adapters merged into them."""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor

from dominie.core.errors import InputError
from dominie.models.loading import DTYPES, load_config
from dominie.models.spec import Model, base_and_adapter

#: peft's own name for the adapter that is trained; its files lie where a model's files lie.
STUDENT = "default"

#: Ways to begin an adapter that leave the base as it is; others change it as they are loaded.
_PLAIN_BEGINNINGS = (True, False, "gaussian")


@dataclass(frozen=True)
class Sharing:
    """Which teachers are minds over the student's base.

    Attributes:
        adapters: folder of each one's adapter by name, None for the bare base.
        apart: why other teachers over that base are loaded a second time, by name.
    """

    adapters: Mapping[str, str | None]
    apart: Mapping[str, str]


def sharing(student: Model, teachers: Mapping[str, Model], *, lora: Any, precision: str) -> Sharing:
    """Find the teachers that need no weights of their own beside a student under LoRA.

    Those are the very model the student starts from, and adapters over the student's base. They
    have to be held as they would be alone: in the same dtype, the same way.

    Args:
        student: who learns.
        teachers: by name.
        lora: the stage's `dominie.training.settings.Lora`, None where every weight is trained.
        precision: `fp32`, `bf16` or `fp16`: dtype of the base under LoRA.
    """
    adapters: dict[str, str | None] = {}
    apart: dict[str, str] = {}
    if lora is None:
        return Sharing(adapters, apart)
    base, worn = base_and_adapter(student)
    merged = worn if lora.merge else None  # an adapter that goes on being trained is not merged
    for name, spec in teachers.items():
        place, adapter = base_and_adapter(spec)
        if _place(place) != _place(base):
            continue
        if _place(adapter) == _place(merged):
            adapter = None
        elif adapter is None or merged is not None:
            apart[name] = "the student's weights hold an adapter that it lacks"
            continue
        reason = _held_otherwise(student, spec, precision) or _no_plain_lora(adapter)
        if reason:
            apart[name] = reason
        else:
            adapters[name] = adapter
    return Sharing(adapters, apart)


class Mind:
    """A frozen teacher that lives in the student's model: another adapter, or the bare base.

    Args:
        model: the student, peft adapters over its base.
        adapter: folder of the teacher's adapter, None for the bare base.

    Raises:
        InputError: the adapter cannot be loaded.
    """

    def __init__(self, model: Any, adapter: str | None) -> None:
        self.model, self._adapter = model, None
        # Whoever saves the student does not save its teachers.
        if not isinstance(model.save_pretrained, functools.partial):
            model.save_pretrained = functools.partial(
                model.save_pretrained, selected_adapters=[STUDENT]
            )
        if adapter is None:
            return
        self._adapter = f"teacher_{len(model.peft_config)}"
        try:
            model.load_adapter(adapter, self._adapter, is_trainable=False)
        except Exception as error:
            raise InputError(
                "the adapter cannot be laid over the student's base",
                where=adapter,
                found=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}",
                do="check that the folder is complete and of one model",
            ) from error
        model.set_adapter(STUDENT)

    @contextlib.contextmanager
    def awake(self) -> Iterator[Any]:
        """Within, the model is this teacher: no dropout, no other adapter."""
        model, training = self.model, self.model.training
        model.eval()
        if self._adapter is None:
            model.base_model.disable_adapter_layers()
        else:
            model.base_model.set_adapter(self._adapter, inference_mode=True)
        try:
            yield model
        finally:
            if self._adapter is None:
                model.base_model.enable_adapter_layers()
            else:
                model.base_model.set_adapter(STUDENT)
            model.train(training)


def _place(path: str | None) -> str | None:
    return str(Path(path).resolve()) if path and Path(path).exists() else path


def _held_otherwise(student: Model, teacher: Model, precision: str) -> str | None:
    """Why a teacher is not held as the student's base is; None where it is."""
    for key, word in (("revision",) * 2, ("attention",) * 2, ("held", "placement")):
        if getattr(student, key) != getattr(teacher, key):
            return f"its {word} is not the student's"
    if teacher.map_tokens:
        return "it has other token ids"
    config = load_config(teacher)
    own = str(config.dtype if teacher.dtype == "auto" else DTYPES[teacher.dtype])
    run = str(DTYPES[precision])
    if own.removeprefix("torch.") != run.removeprefix("torch."):
        return f"it is held in {own.removeprefix('torch.')}, the run's base in {precision}"
    return None


def _no_plain_lora(adapter: str | None) -> str | None:
    """Why an adapter cannot lie beside the student's; None where it can."""
    if adapter is None:
        return None
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
