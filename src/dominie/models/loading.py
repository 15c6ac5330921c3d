"""Loads models and tokenizers from folders and hub ids: frozen, or ready to train."""

from __future__ import annotations

import dataclasses
import logging
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dominie.core.errors import InputError
from dominie.data.trial_process import check_tokenizer, trial
from dominie.models.adapters import TIED, with_lora
from dominie.models.gguf_header import is_gguf
from dominie.models.head import untie
from dominie.models.model_folder import base_and_adapter, check_model, tokenizer_place
from dominie.models.moe import follow_autocast
from dominie.models.placement import (
    check_package,
    offloaded,
    quantised,
    sharded,
    under_adapters,
    warn_of_whole_experts,
)
from dominie.models.spec import Model, allowed, naming

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

logger = logging.getLogger(__name__)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def load_tokenizer(spec: Model) -> Any:
    """The tokenizer of a model.

    Raises:
        InputError: no tokenizer there, a slow one, or one that takes too much time or memory.
    """
    trial.start()  # while transformers is imported
    place = tokenizer_place(spec)
    if is_gguf(place):
        from dominie.models.gguf_model import gguf_tokenizer

        return gguf_tokenizer(dataclasses.replace(spec, path=place))
    from transformers import AutoTokenizer, PreTrainedTokenizerFast
    from transformers.utils import cached_file

    with naming(place, "tokenizer"):
        file = cached_file(
            place,
            "tokenizer.json",
            revision=spec.revision,
            _raise_exceptions_for_missing_entries=False,
        )
    check_tokenizer(place, spec.revision, None if file is None else Path(file))
    with naming(place, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(
            place,
            revision=spec.revision,
            trust_remote_code=allowed(),
            mistral_format=False,  # mistral-common's has no chat template, nor tells positions
        )
        if not getattr(tokenizer, "is_fast", False) and (Path(place) / "tokenizer.json").exists():
            logger.warning(
                "%s: tokenizer.json is used, and not %s, which the configuration names",
                place,
                type(tokenizer).__name__,
            )
            tokenizer = PreTrainedTokenizerFast.from_pretrained(place)
    if not getattr(tokenizer, "is_fast", False):
        raise InputError(
            "a slow tokenizer cannot say which characters a token covers",
            where=spec.path,
            expected="a fast tokenizer (tokenizer.json)",
            found=type(tokenizer).__name__,
            do="put the tokenizer.json of the model beside its weights",
        )
    template = tokenizer.chat_template  # of its file transformers keeps a byte-order mark
    if isinstance(template, str):
        tokenizer.chat_template = template.removeprefix("\ufeff")
    elif template:  # several by name
        tokenizer.chat_template = {k: text.removeprefix("\ufeff") for k, text in template.items()}
    return tokenizer


_MOST_BYTES = 2**26  # of config.json; the longest have some 100 KB
_MOST_VALUES = 200_000
_MOST = {"layer": 10_000, "expert": 2**16, "position": 2**40}  # by what a key has in it
_MOST |= dict.fromkeys(("_size", "_dim", "_head", "n_embd", "d_model"), 2**24)


def check_sizes(place: str, revision: str | None, **options: Any) -> None:
    """Refuse a configuration of more layers, or wider ones, than any model has.

    transformers writes a list of the layers when it reads one.

    Args:
        place: folder, file or hub id.
        revision: on the hub.
        options: of transformers' loaders.

    Raises:
        InputError: names the key.
        Exception: there is no configuration, or none that can be read.
    """
    from transformers import PreTrainedConfig

    file = Path(place) / "config.json" if Path(place).is_dir() else Path(place)
    if file.is_file() and (size := file.stat().st_size) > _MOST_BYTES:
        raise InputError(
            "the configuration is too long to be one",
            where=str(file),
            expected=f"at most {_MOST_BYTES >> 20} MiB",
            found=f"{size >> 20:,} MiB",
            do="copy or download the folder again",
        )
    raw, _ = PreTrainedConfig.get_config_dict(place, revision=revision, **options)
    waiting: list[tuple[str, Any]] = [("", raw)]
    for key, value in waiting:
        most = min((most for part, most in _MOST.items() if part in key), default=None)
        beyond = most is not None and isinstance(value, int | float) and abs(value) > most
        inner: list[tuple[str, Any]] = []
        if isinstance(value, dict):
            inner = [(str(name), each) for name, each in value.items()]
        elif isinstance(value, list):
            inner = [(key, each) for each in value]
        if beyond or len(waiting) + len(inner) > _MOST_VALUES:
            raise InputError(
                "the configuration describes a model that nobody can load",
                where=f"{place}: {key}",
                expected=f"at most {most:,}" if beyond else f"at most {_MOST_VALUES:,} values",
                found=str(value)[:40] if beyond else f"{len(waiting) + len(inner):,}",
                do="correct the number in config.json, or copy or download the folder again",
            )
        waiting += inner


def load_config(spec: Model) -> Any:
    """The configuration of a model's language part: its layers, heads and context.

    Raises:
        InputError: there is none, or transformers does not know the family.
    """
    from transformers import AutoConfig

    base, _ = base_and_adapter(spec)
    if is_gguf(base):
        from dominie.models.gguf_model import gguf_config

        return gguf_config(dataclasses.replace(spec, path=base))
    check_model(base, spec.revision)
    with naming(base, "configuration"):
        check_sizes(base, spec.revision)
        config = AutoConfig.from_pretrained(
            base, revision=spec.revision, trust_remote_code=allowed()
        )
        return config.get_text_config()


def load_student(
    spec: Model, *, lora: Any = None, precision: str = "fp32", gradient_checkpointing: bool = False
) -> Any:
    """A model to train: fp32 weights, or frozen ones in the run's precision under fp32 adapters.

    A student that is itself an adapter goes on from it if an adapter is to be written: one over
    a base that is not written would be of no use. Else it is merged into the weights first.

    Args:
        spec: which model.
        lora: a `dominie.training.settings.Lora`, None to train every weight.
        precision: `fp32`, `bf16` or `fp16`: dtype of the frozen base under LoRA.
        gradient_checkpointing: recompute activations in the backward pass, without re-entrance.
    """
    spec.check_trainable(adapters=lora is not None)
    base_dtype = torch.float32 if lora is None else DTYPES[precision]
    base, adapter = base_and_adapter(spec)
    goes_on = adapter is not None and lora is not None and not lora.merge
    if goes_on:
        spec = dataclasses.replace(spec, path=base, adapter=None)
    model = _load(spec, dtype=base_dtype, quantization=under_adapters(spec))
    model.train()
    if lora is None:
        follow_autocast(model)
        model.requires_grad_(True)  # what an adapter was merged into comes frozen
    if gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if lora is not None:
        model = with_lora(model, lora, where=spec.path, adapter=adapter if goes_on else None)
    return model


def load_frozen(
    spec: Model, *, device: torch.device | str = "cpu", mesh: DeviceMesh | None = None
) -> Any:
    """A model to learn from or to evaluate: no gradients, no dropout.

    Args:
        spec: which model, and where its weights are placed.
        device: that it runs on.
        mesh: of the processes that one with `placement: sharded` is sharded over; None if
            this one runs it alone, as one that waits in main memory if the device is too small.
    """
    device = torch.device(device)
    if spec.bits:
        check_package(spec.bits, where=spec.path)
    model = _load(spec, dtype=None if spec.dtype == "auto" else DTYPES[spec.dtype])
    model.requires_grad_(False)
    model.eval()
    if spec.placed == "sharded" and mesh is not None:
        return sharded(model, mesh)
    if spec.placed == "cpu" or (spec.placed == "sharded" and not _fits(model, device)):
        return offloaded(model, device)
    return quantised(model, spec.bits, device) if spec.bits else model.to(device)


def _fits(model: Any, device: torch.device) -> bool:
    """Whether the weights leave a tenth of what a GPU has free."""
    if device.type != "cuda":
        return True
    free, _ = torch.cuda.mem_get_info(device)
    weights: int = sum(p.nbytes for p in model.parameters())
    return weights < 0.9 * free


def _load(spec: Model, *, dtype: torch.dtype | None, quantization: Any = None) -> Any:
    from transformers import AutoModelForCausalLM

    base, adapter = base_and_adapter(spec)
    check_model(base, spec.revision)
    options: dict[str, Any] = {"dtype": dtype or "auto"}
    if spec.attention != "auto":
        options["attn_implementation"] = spec.attention
    if quantization is not None:
        options["quantization_config"] = quantization
    with naming(base, "model"):
        check_sizes(base, spec.revision)
        model, found = AutoModelForCausalLM.from_pretrained(
            base,
            revision=spec.revision,
            use_safetensors=True,
            trust_remote_code=allowed(),
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused below with a clearer message
            **options,
        )
    check_complete(found, where=base)
    if quantization is not None:
        warn_of_whole_experts(model, spec)
    return model if adapter is None else _with_adapter(model, adapter)


def restore_weights(model: Any, folder: str) -> None:
    """Put the weights that `save_pretrained` wrote to a folder back into a model.

    Its files need not have the model's names: a mixture's experts are fused in memory and apart on
    disk, and only `from_pretrained` knows how.

    Raises:
        InputError: the folder does not hold all of the model's weights.
    """
    with naming(folder, "checkpoint"):
        saved, found = type(model).from_pretrained(
            folder, dtype=model.dtype, use_safetensors=True, output_loading_info=True
        )
    check_complete(found, where=folder)
    model.load_state_dict(saved.state_dict())


def check_complete(found: Mapping[str, Any], *, where: str) -> None:
    """Refuse weights that are not the configuration's: transformers would draw them at random.

    Args:
        found: what `from_pretrained` says of its loading.
        where: the folder or file.

    Raises:
        InputError: names the weights.
    """
    for kind, meaning in (
        ("missing_keys", "the model needs weights that its files lack"),
        ("mismatched_keys", "weights have another shape than the configuration says"),
        ("unexpected_keys", "the files hold weights that the model has no place for"),
    ):
        keys = sorted(str(key) if isinstance(key, str) else str(key[0]) for key in found[kind])
        if keys:
            raise InputError(
                meaning,
                where=where,
                expected="weights and config.json of one model",
                found=", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if keys[3:] else ""),
                do="copy or download the folder again",
            )


def _with_adapter(model: Any, adapter: str) -> Any:
    """The model with an adapter merged into its weights."""
    from peft import PeftModel

    with naming(adapter, "adapter"), warnings.catch_warnings():
        warnings.filterwarnings("error", message="Found missing adapter keys")
        warnings.filterwarnings("ignore", message=TIED)
        adapted = PeftModel.from_pretrained(model, adapter)
    untie(adapted, where=adapter)
    return adapted.merge_and_unload()
