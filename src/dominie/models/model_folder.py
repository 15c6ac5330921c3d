"""A model's folder, or its name on the hub: what must lie there, and an adapter's base."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Collection
from pathlib import Path

from dominie.core.content_hash import content_hashes
from dominie.core.errors import InputError, hub_error
from dominie.core.io import mapping, write_json
from dominie.core.network import through_proxy
from dominie.models.gguf_header import is_gguf
from dominie.models.spec import Model

_NAMES_BASE = "base_model_name_or_path"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
_WEIGHTS = ".safetensors"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")


def base_and_adapter(spec: Model) -> tuple[str, str | None]:
    """Folder or hub id of a model's weights, and of the adapter on top of them.

    A folder with an `adapter_config.json` is an adapter, which names its base itself.

    Raises:
        InputError: that file cannot be read or names no base, the base is another model than the
            adapter was trained over, or the adapter is pickled.
    """
    config = Path(spec.path) / "adapter_config.json"
    if spec.adapter is not None:
        if Path(spec.adapter).is_dir():
            _check_weights(spec.adapter, {entry.name for entry in Path(spec.adapter).iterdir()})
        return _known_base(spec.path, Path(spec.adapter), given=True), spec.adapter
    if not config.is_file():
        return spec.path, None
    try:
        base = json.loads(config.read_text(encoding="utf-8"))[_NAMES_BASE]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            "the adapter's configuration cannot be read",
            where=str(config),
            expected="a JSON object with base_model_name_or_path",
            found=f"{type(error).__name__}: {error}",
        ) from None
    _check_weights(spec.path, {entry.name for entry in Path(spec.path).iterdir()})
    if not isinstance(base, str) or not base:
        raise InputError(
            "the adapter does not say which model it was trained over",
            where=str(config),
            expected="base_model_name_or_path",
            do=f"declare both: models: {{NAME: {{path: BASE, adapter: {spec.path}}}}}",
        )
    return _known_base(base, Path(spec.path), given=False), spec.path


#: Beside an adapter: where its base is, seen from there, and the base's content.
_BASE_FILE = "base_model.json"


def write_base(adapter: Path, base: str) -> None:
    """Write down which model an adapter was trained over, so that no other is taken for it.

    Args:
        adapter: its folder, beside the place where it will be; its configuration names the base by
            an absolute path then.
        base: its folder; of one on the hub nothing is written.
    """
    if not Path(base).is_dir():
        return
    way = os.path.relpath(Path(base).resolve(), adapter.resolve())
    write_json(adapter / _BASE_FILE, {"path": Path(way).as_posix(), "files": _hashes(Path(base))})
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    config[_NAMES_BASE] = str(Path(base).absolute())
    write_json(adapter / "adapter_config.json", config, indent=2)


def _known_base(named: str, adapter: Path, *, given: bool) -> str:
    """The base: where it was, seen from the adapter, or where it is named; there alone if given."""
    if is_gguf(named):  # compared when it is dequantised
        return named
    try:
        known = mapping(json.loads((adapter / _BASE_FILE).read_text(encoding="utf-8")))
    except FileNotFoundError:
        return named  # an adapter of another program
    except (OSError, ValueError):
        known = {}
    near = os.path.normpath(adapter.resolve() / str(known.get("path")))
    found = [place for place in ([] if given else [near]) + [named] if Path(place).is_dir()]
    files = known.get("files")
    for place in found:
        if _hashes(Path(place), config="config.json" in mapping(files)) == files:
            here = os.path.relpath(place)
            return place if given or here.startswith(os.pardir) else here
    if not found and not named.startswith((".", "/", "~")) and named.count("/") == 1:
        return named  # it was published since
    raise InputError(
        "the adapter was trained over another model" if found else "the adapter's base is missing",
        where=str(adapter),
        expected="the weights and the config.json whose hashes are in its base_model.json",
        found=f"others in {found[0]}" if found else f"nothing at {near}, nor at {named}",
        do="put the base back; to take another for it, remove base_model.json, and name the other "
        "in models: {NAME: {path: BASE, adapter: FOLDER}}",
    )


def _hashes(folder: Path, *, config: bool = True) -> dict[str, str]:
    """Hash the files that make a model what it is; its configuration was once left out."""
    files = sorted(folder.glob("*.safetensors"))
    files += [folder / "config.json"] if config and (folder / "config.json").is_file() else []
    return dict(zip((file.name for file in files), content_hashes(files), strict=True))


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
    if not _check_weights(path, names):
        raise _incomplete(path, "model.safetensors", names)


def _check_weights(path: str, names: Collection[str]) -> bool:
    """Return whether a folder has weights; refuse pickled ones, and an index that leads to others.

    Raises:
        InputError: names the file.
    """
    if not any(name.endswith((".safetensors", ".safetensors.index.json")) for name in names):
        if any(name.endswith(_PICKLES) for name in names):
            raise InputError(
                "the weights are pickled, and loading a pickle runs whatever is in it",
                where=path,
                expected="*.safetensors",
                found=", ".join(sorted(n for n in names if n.endswith(_PICKLES))[:3]),
                do="where you trust them, load them with transformers and save_pretrained again",
            )
        return False
    for index in (Path(path) / name for name in names if name.endswith(".safetensors.index.json")):
        try:
            parts = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            astray = sorted(p for p in parts if Path(p).name != p or Path(p).suffix != _WEIGHTS)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise InputError(
                "the index of the weights cannot be read",
                where=str(index),
                expected="a JSON object with weight_map",
                found=type(error).__name__,
                do="copy or download the folder again",
            ) from None
        if astray:
            raise InputError(
                "the index of the weights names a file that is not read as weights",
                where=str(index),
                expected="*.safetensors in the same folder",
                found=astray[0],
                do="copy or download the folder again, from where you trust it",
            )
    return True


def is_model(folder: Path) -> bool:
    """Whether a folder holds a model that was written whole: weights, or an adapter."""
    return any((folder / name).is_file() for name in ("config.json", "adapter_config.json"))


def tokenizer_place(spec: Model) -> str:
    """Folder or hub id of a model's tokenizer: that of its base, if an adapter has none.

    Raises:
        InputError: says which file is missing.
    """
    base, _ = base_and_adapter(spec)
    for path in (spec.path, base):
        if is_gguf(path) or not _is_folder(path, spec.revision):
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
            expected="a folder with config.json, *.safetensors and tokenizer.json, or a .gguf file",
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
            found=" ".join(str(error).split())[:200] + through_proxy("https://huggingface.co"),
            do=None if wrong_name else "check the name, the network and `hf auth login`",
        ) from error


def _incomplete(path: str, missing: str, names: set[str]) -> InputError:
    return InputError(
        f"the model's folder has no {missing}",
        where=path,
        found=", ".join(sorted(names)[:6]) + (" …" if len(names) > 6 else "") or "an empty folder",
        do="put tokenizer.json and the chat template beside tekken.json, which is not read"
        if "tekken.json" in names
        else "copy or download the folder again",
    )
