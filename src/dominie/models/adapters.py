"""Adapters over a base: applied, continued, shared with teachers, merged."""

from __future__ import annotations

import contextlib
import copy
import importlib
import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dominie.core.errors import InputError, nearest
from dominie.models.head import text_config, untie
from dominie.models.info import ModelInfo
from dominie.models.spec import Model, naming

#: Peft's warning of adapters on tied weights, which are given one each.
TIED = "Model has `tie_word_embeddings=True`"

#: What `all-linear` leaves out, by the names that most families have for it.
_NOT_LINEAR = {"lm_head", "embed_out", "embed_tokens", "wte"}

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
            reason = _no_plain_lora(adapter, lora)
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


def _no_plain_lora(adapter: str, lora: Any) -> str | None:
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
    if not plain:
        return "its adapter is no plain LoRA"
    mine, theirs = lora.modules_to_save or [], config.get("modules_to_save") or []
    if _targeted(theirs, lora.target_modules) or _targeted(mine, config.get("target_modules")):
        return "one trains a module in full that the other adapts"
    return None


def _targeted(names: Sequence[str], targets: Any) -> bool:
    """Whether `target_modules` may adapt one of the modules that are trained in full."""
    if isinstance(targets, str):  # an expression is on whole names, which are not known here
        return bool(names) and (targets != "all-linear" or not set(names) <= _NOT_LINEAR)
    last = {name.rpartition(".")[2] for name in targets or []}
    return bool(last.intersection(name.rpartition(".")[2] for name in names))


def with_lora(model: Any, lora: Any, *, where: str, adapter: str | None = None) -> Any:
    """The model under fp32 adapters: fresh ones, or one of a folder.

    Raises:
        InputError: the model, named by `where`, has no module that they fit, or none of a name
            that is given.
    """
    from peft import LoraConfig, PeftModel, get_peft_model

    _refuse_unknown_names(model, lora, where)
    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        modules_to_save=lora.modules_to_save,
        task_type="CAUSAL_LM",
    )
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=TIED)
            if adapter is None:
                adapted = get_peft_model(model, config, autocast_adapter_dtype=True)
            else:
                config = _config_of(adapter, lora)
                adapted = PeftModel.from_pretrained(
                    model, adapter, config=config, is_trainable=True
                )
    except ValueError as error:
        raise InputError(
            "LoRA cannot be applied to this model",
            where=where,
            expected=f"target_modules: all-linear, or a list of {_linear_modules(model)}",
            found=" ".join(str(error).split())[:200],
        ) from None
    untie(adapted, where=where)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return adapted


def _refuse_unknown_names(model: Any, lora: Any, where: str) -> None:
    """Refuse names that no module has: peft passes over them as long as one of the list fits."""
    targets = lora.target_modules if isinstance(lora.target_modules, list) else []
    modules = [f".{name}" for name, _ in model.named_modules()]
    for name in (*targets, *(lora.modules_to_save or ())):
        if not any(module.endswith(f".{name}") for module in modules):
            weighty = (n for n, m in model.named_modules() if [*m.parameters(recurse=False)])
            known = sorted({each.rpartition(".")[2] for each in weighty})
            meant = nearest(name, known)
            raise InputError(
                "LoRA is to go on a module that the model has not",
                where=where,
                expected=f"names of modules: {', '.join(known)}",
                found=repr(name),
                do=f"did you mean {meant}?" if meant else "correct or remove the name",
            )


def config_under_lora(config: Any, lora: Any) -> Any:
    """The configuration of what a stage writes: another if adapters untie the head.

    Args:
        config: of the language part of the student; None if it is not known.
        lora: a `dominie.training.settings.Lora`, None if every weight is trained.

    Returns:
        `config` itself, or a copy of it without tied weights.
    """
    from transformers import AutoModelForCausalLM

    explicit = lora and (lora.modules_to_save or lora.target_modules != "all-linear")
    if not explicit or not getattr(config, "tie_word_embeddings", False):
        return config
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(copy.deepcopy(config))
            changed = text_config(with_lora(model, lora, where="train.lora"))
    except Exception:  # whether the adapters fit is said where the whole model is loaded
        return config
    return config if changed.tie_word_embeddings else changed


def _config_of(adapter: str, lora: Any) -> Any:
    """The configuration of an adapter that goes on being trained, with the stage's dropout.

    Raises:
        InputError: the stage wants an adapter of another shape.
    """
    from peft import LoraConfig

    with naming(adapter, "adapter"):
        config = LoraConfig.from_pretrained(adapter)
    asked = {"r": lora.r, "lora_alpha": lora.alpha, "modules_to_save": lora.modules_to_save}
    found = {key: getattr(config, key) for key in asked}
    if not isinstance(lora.target_modules, str):
        asked["target_modules"] = sorted(lora.target_modules)
        found["target_modules"] = sorted(config.target_modules)
    apart = [key for key in asked if asked[key] != found[key]]
    if apart:
        raise InputError(
            "the student is an adapter of another shape than train.lora asks for",
            where=adapter,
            expected=", ".join(f"{key} {asked[key]}" for key in apart),
            found=", ".join(f"{key} {found[key]}" for key in apart),
            do="give train.lora the adapter's shape, or set lora.merge: true to train a new one "
            "over the merged weights",
        )
    config.lora_dropout = lora.dropout
    return config


def _linear_modules(model: Any) -> str:
    """The names, without their layers, of the modules that LoRA fits."""
    named = model.named_modules()
    found = {name.rpartition(".")[2] for name, m in named if isinstance(m, nn.Linear)}
    return ", ".join(sorted(found))


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
    from torch.distributed.tensor import DTensor

    if isinstance(tensor, DTensor):
        return tensor.full_tensor().cpu()
    return tensor.clone() if copied else tensor
