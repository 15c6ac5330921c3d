"""A model's files: read a tensor at a time, hashed, and completed for other tools."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dominie.core.content_hash import content_hashes
from dominie.core.errors import InputError
from dominie.data.assistant_spans import ends_of_turn
from dominie.models.gguf_header import is_gguf
from dominie.models.model_folder import base_and_adapter, check_model
from dominie.models.spec import Model

#: Dtypes by the names that safetensors has for them.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}

#: How a tensor's name ends that old Llama checkpoints hold and no model reads.
UNUSED = "rotary_emb.inv_freq"


@dataclass(frozen=True)
class Weights:
    """The tensors of a model's safetensors files, by name.

    Attributes:
        folder: of its files.
        shapes: every tensor as one without storage (its shape and dtype).
    """

    folder: Path
    shapes: Mapping[str, Tensor]
    _files: Mapping[str, Any]

    _stored: Mapping[str, str] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Tensor:
        name = self._stored.get(name, name)
        tensor: Tensor = self._files[name].get_tensor(name)
        return tensor

    def with_names(self, stored: Mapping[str, str]) -> Weights:
        """The same tensors, some under further names: by such a name, the one it is stored by."""
        shapes = dict(self.shapes) | {name: self.shapes[own] for name, own in stored.items()}
        return dataclasses.replace(self, shapes=shapes, _stored=dict(stored))


@contextlib.contextmanager
def open_weights(spec: Model) -> Iterator[Weights]:
    """Within, the tensors of a model can be read one by one.

    Raises:
        InputError: no such model, an adapter without its base's weights, or files that cannot
            be read.
    """
    from safetensors import SafetensorError, safe_open

    folder = _local_folder(spec)
    with contextlib.ExitStack() as stack:
        files, shapes = {}, {}
        for path in sorted(folder.glob("*.safetensors")):
            try:
                opened = stack.enter_context(safe_open(path, framework="pt"))
            except (OSError, SafetensorError) as error:
                raise InputError(
                    "the weights cannot be read",
                    where=str(path),
                    found=str(error),
                    do="copy or download the folder again",
                ) from None
            for name in opened.keys():  # noqa: SIM118 - not a mapping
                found = opened.get_slice(name)
                dtype = DTYPES.get(found.get_dtype())
                if dtype is None:
                    raise InputError(
                        "weights of this dtype cannot be worked with",
                        where=f"{path}, {name}",
                        expected=f"one of {', '.join(DTYPES)}",
                        found=found.get_dtype(),
                        do="name the model before it was quantised",
                    )
                shapes[name] = torch.empty(found.get_shape(), dtype=dtype, device="meta")
                files[name] = opened
        yield Weights(folder, shapes, files)


def copy_configuration(source: Path, folder: Path) -> None:
    """The configuration and generation settings of one model's folder, in another."""
    for name in ("config.json", "generation_config.json"):
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def _local_folder(spec: Model) -> Path:
    path, adapter = base_and_adapter(spec)
    if adapter is not None:
        raise InputError(
            "an adapter is not a model's weights",
            where=adapter,
            expected="a folder with the weights of a whole model",
            do="let the stage that trains it write them: train.lora.merge: true",
        )
    check_model(path, spec.revision)
    if Path(path).is_dir():
        return Path(path)
    from huggingface_hub import snapshot_download

    wanted = ["*.safetensors", "*.json"]
    return Path(snapshot_download(path, revision=spec.revision, allow_patterns=wanted))


def weights_fingerprint(spec: Model) -> str:
    """Hash of a frozen model: its configuration, its weights, dtype and rounding.

    A model in a folder is known by its content, one on the hub by its name and commit.
    """
    base, adapter = base_and_adapter(spec)
    identity: dict[str, Any] = {
        "dtype": spec.dtype,
        "quantize": spec.bits,
        "map_tokens": spec.map_tokens,
    }
    for part, path in (("base", base), ("adapter", adapter)):
        if path is not None:
            identity[part] = _contents(path, spec.revision)
    text = json.dumps(identity, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def model_identity(spec: Model) -> dict[str, Any]:
    """Name a model for a fingerprint: by its hub id, or by what its folder holds, wherever it is.

    Where weights are placed changes nothing, unless they are rounded.
    """
    identity = dataclasses.asdict(spec)
    del identity["placement"]
    identity["quantize"] = spec.bits
    for key, path in (("path", spec.path), ("adapter", spec.adapter)):
        if path and Path(path).is_dir():
            files = sorted(
                entry
                for entry in Path(path).iterdir()
                if entry.is_file() and not entry.name.startswith(".")
                if entry.name != "README.md"  # its card changes nothing
            )
            hashes = content_hashes(files)
            identity[key] = [(file.name, each) for file, each in zip(files, hashes, strict=True)]
        elif path and is_gguf(path):
            identity[key] = content_hashes([Path(path)])
    base, _ = base_and_adapter(spec)
    if base != spec.path and Path(base).is_dir():  # that an adapter of another program names
        identity["base"] = _contents(base, None)
    return identity


def commit(path: str, revision: str | None) -> str | None:
    """The commit of a hub model that has been fetched; the revision as given if it has not."""
    from huggingface_hub import try_to_load_from_cache

    if Path(path).is_dir():
        return None
    file = try_to_load_from_cache(path, "config.json", revision=revision)
    return Path(file).parent.name if isinstance(file, str) else revision


def _contents(path: str, revision: str | None) -> Any:
    if not Path(path).is_dir():
        return [path, commit(path, revision)]
    configs = [Path(path) / name for name in ("config.json", "adapter_config.json")]
    files = [*filter(Path.exists, configs), *sorted(Path(path).glob("*.safetensors*"))]
    return [
        [file.name, file.stat().st_size, each]
        for file, each in zip(files, content_hashes(files), strict=True)
    ]


def prepare_export(folder: Path, tokenizer: Any, ends: Sequence[int] | None = None) -> None:
    """Have a saved model stop where its answers end, generate with a cache, and split texts alike.

    A base model ends texts, not turns: its own settings know nothing of the token that its chat
    template ends an answer with. transformers and vLLM stop at every token that
    `generation_config.json` names.

    Args:
        folder: of weights or of an adapter.
        tokenizer: with a chat template.
        ends: tokens that end an answer; None is what the chat template says of examples.
    """
    config = _read_json(folder / "config.json")
    if config:
        for part in (config, *(value for value in config.values() if isinstance(value, dict))):
            if part.get("use_cache") is False:  # training's, not the model's
                part["use_cache"] = True
        _write_json(folder / "config.json", config)
    settings = _read_json(folder / "generation_config.json")
    stops = settings.get("eos_token_id", config.get("eos_token_id"))
    if stops is None:
        stops = tokenizer.eos_token_id
    known = stops if isinstance(stops, list) else [] if stops is None else [stops]
    ends = list(dict.fromkeys([*known, *(ends_of_turn(tokenizer) if ends is None else ends)]))
    if ends:
        settings["eos_token_id"] = ends[0] if len(ends) == 1 else ends
    if settings.get("pad_token_id") is None and tokenizer.pad_token_id is not None:
        settings["pad_token_id"] = tokenizer.pad_token_id
    _write_json(folder / "generation_config.json", settings)
    if (pieces := _sentencepiece(tokenizer)) and not (folder / pieces.name).exists():
        shutil.copyfile(pieces, folder / pieces.name)


def _sentencepiece(tokenizer: Any) -> Path | None:
    """The SentencePiece model that a tokenizer was made of, if it has one beside it.

    transformers does without and saves none. llama.cpp merges by its scores, and splits words
    otherwise if a folder lacks it.
    """
    if not (home := getattr(tokenizer, "name_or_path", None)):
        return None
    from transformers.utils import cached_file

    try:
        found = cached_file(
            home, "tokenizer.model", revision=tokenizer.init_kwargs.get("_commit_hash")
        )
    except (OSError, ValueError):  # it has none, or the hub is out of reach
        return None
    return Path(found) if found else None


def _read_json(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
