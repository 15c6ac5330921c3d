"""Where a model's files lie, and whether they are there, before anything is loaded."""

from __future__ import annotations

import functools
import json
from pathlib import Path

from dominie.errors import InputError, hub_error
from dominie.models.spec import Model

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")


def base_and_adapter(spec: Model) -> tuple[str, str | None]:
    """Folder or hub id of a model's weights, and of the adapter laid over them.

    A folder with an `adapter_config.json` is an adapter, which names its base itself.

    Raises:
        InputError: that file cannot be read or names no base.
    """
    config = Path(spec.path) / "adapter_config.json"
    if spec.adapter is not None or not config.is_file():
        return spec.path, spec.adapter
    try:
        base = json.loads(config.read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            "the adapter's configuration cannot be read",
            where=str(config),
            expected="a JSON object with base_model_name_or_path",
            found=f"{type(error).__name__}: {error}",
        ) from None
    if not isinstance(base, str) or not base:
        raise InputError(
            "the adapter does not say which model it was trained over",
            where=str(config),
            expected="base_model_name_or_path",
            do=f"declare both: models: {{NAME: {{path: BASE, adapter: {spec.path}}}}}",
        )
    return base, spec.path


def check_model(path: str, revision: str | None) -> None:
    """Refuse what cannot be a model's folder, or a hub id that leads nowhere.

    Raises:
        InputError: says which file is missing.
    """
    if not _is_folder(path, revision):
        return
    names = {entry.name for entry in Path(path).iterdir()}
    if "config.json" not in names:
        raise _incomplete(path, "config.json", names)
    if not any(name.endswith((".safetensors", ".safetensors.index.json")) for name in names):
        if any(name.endswith(_PICKLES) for name in names):
            raise InputError(
                "the weights are pickled, and loading a pickle runs whatever is in it",
                where=path,
                expected="*.safetensors",
                found=", ".join(sorted(n for n in names if n.endswith(_PICKLES))[:3]),
                do="where you trust them, load them with transformers and save_pretrained again",
            )
        raise _incomplete(path, "model.safetensors", names)


def is_model(folder: Path) -> bool:
    """Whether a folder holds a model that was written whole: weights, or an adapter."""
    return any((folder / name).is_file() for name in ("config.json", "adapter_config.json"))


def tokenizer_place(spec: Model) -> str:
    """Folder or hub id of a model's tokenizer: that of its base, where an adapter has none.

    Raises:
        InputError: says which file is missing.
    """
    base, _ = base_and_adapter(spec)
    for path in (spec.path, base):
        if not _is_folder(path, spec.revision):
            return path
        names = {entry.name for entry in Path(path).iterdir()}
        if names.intersection(_TOKENIZER_FILES):
            return path
    raise _incomplete(base, "tokenizer.json", names)


def _is_folder(path: str, revision: str | None) -> bool:
    """Whether the path is a folder here; else it has to be the id of a model on the hub."""
    if Path(path).is_dir():
        return True
    if Path(path).exists() or path.startswith((".", "/", "~")):
        raise InputError(
            "this is not a model's folder",
            where=path,
            expected="a folder with config.json, *.safetensors and tokenizer.json",
            found="a file" if Path(path).exists() else "nothing",
        )
    _check_hub(path, revision)
    return False


@functools.cache
def _check_hub(name: str, revision: str | None) -> None:
    """Ask the hub once, since the loaders ask for every file again and again for a minute."""
    from huggingface_hub import model_info, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        if isinstance(try_to_load_from_cache(name, "config.json", revision=revision), str):
            return
        model_info(name, revision=revision, timeout=20)
    except Exception as error:
        wrong_name = isinstance(error, HFValidationError)
        raise hub_error(error)(
            "neither a folder here nor a model that the hub gives out",
            where=name,
            expected="a folder, or organisation/model",
            found=" ".join(str(error).split())[:200],
            do=None if wrong_name else "check the name, the network and `hf auth login`",
        ) from error


def _incomplete(path: str, missing: str, names: set[str]) -> InputError:
    return InputError(
        f"the model's folder has no {missing}",
        where=path,
        found=", ".join(sorted(names)[:6]) + (" …" if len(names) > 6 else "") or "an empty folder",
        do="copy or download the folder again",
    )
