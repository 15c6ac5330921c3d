"""Which model, where its weights are placed, and where its files are."""

from __future__ import annotations

import contextlib
import functools
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

from dominie.core.content_hash import content_hashes
from dominie.core.errors import InputError, hub_error
from dominie.core.io import mapping, write_json
from dominie.core.network import through_proxy
from dominie.core.references import PathName

Placement = Literal["device", "cpu", "8bit", "4bit", "sharded", "cached"]
Bits = Literal["8bit", "4bit"]


def bits_of(placement: Placement) -> Bits | None:
    """To how many bits a placement rounds weights; None if it does not."""
    return next((bits for bits in get_args(Bits) if bits == placement), None)


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model to load.

    Attributes:
        path: a folder, a hub id, or a name of the toy world.
        adapter: folder or hub id of a peft adapter on top of it.
        chat_template: file of a Jinja chat template, for a model that has none or another one.
        revision: branch, tag or commit on the hub.
        dtype: dtype of frozen weights; `auto` is the checkpoint's own. A student that is trained
            in full is loaded in fp32 whatever this is.
        attention: implementation transformers uses underneath; `auto` is its own choice, sdpa
            wherever the family has it.
        map_tokens: the model, as a teacher, has the student's tokens under other ids: its embedding
            and head are reordered to the student's.
        placement: where the weights of a frozen model are; None is `device`. `cpu` keeps
            its layers in main memory and each on the device while it runs; `8bit` and `4bit`
            quantise; `sharded` shares the layers out over the processes; `cached` is `cache: true`
            on every source of a stage that can learn from what the model predicts.
        quantize: another way to say `placement: 8bit` or `4bit`.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "strict": True}
    path: PathName
    adapter: PathName | None = None
    chat_template: PathName | None = None
    revision: str | None = None
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    attention: str = "auto"
    map_tokens: bool = False
    placement: Placement | None = None
    quantize: Bits | None = None

    def __post_init__(self) -> None:
        if self.quantize and self.placement and self.quantize != self.placement:
            raise ValueError(
                f"placement is {self.placement} and quantize {self.quantize}: leave one of them out"
            )

    @property
    def placed(self) -> Placement:
        """Where its weights are placed while it is frozen, by `placement` or else `quantize`."""
        return self.placement or self.quantize or "device"

    @property
    def bits(self) -> Bits | None:
        """To how many bits its placement rounds its weights; nothing else of it changes them."""
        return bits_of(self.placed)

    def check_trainable(self, *, adapters: bool, where: str | None = None) -> None:
        """Refuse a student that is placed as only a frozen model can be.

        Args:
            adapters: whether it is trained under LoRA.
            where: what the message names; its path if None.

        Raises:
            InputError: says what to change.
        """
        if self.bits and not adapters:
            raise InputError(
                "quantised weights cannot be trained",
                where=where or self.path,
                do="set train.lora, or remove placement (or quantize)",
            )
        if self.placed not in ("device", *get_args(Bits)):
            raise InputError(
                f"a model with placement: {self.placed} cannot be trained",
                where=where or self.path,
                do="give the student under models a name of its own, without placement; how it is "
                "shared out is the engine's (--engine)",
            )


_NAMES_BASE = "base_model_name_or_path"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")


def base_and_adapter(spec: Model) -> tuple[str, str | None]:
    """Folder or hub id of a model's weights, and of the adapter on top of them.

    A folder with an `adapter_config.json` is an adapter, which names its base itself.

    Raises:
        InputError: that file cannot be read or names no base, or the base is another model than
            the adapter was trained over.
    """
    config = Path(spec.path) / "adapter_config.json"
    if spec.adapter is not None:
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
    write_json(adapter / _BASE_FILE, {"path": Path(way).as_posix(), "files": _weights(Path(base))})
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    config[_NAMES_BASE] = str(Path(base).absolute())
    write_json(adapter / "adapter_config.json", config, indent=2)


def _known_base(named: str, adapter: Path, *, given: bool) -> str:
    """The base: where it was, seen from the adapter, or where it is named; there alone if given."""
    try:
        known = mapping(json.loads((adapter / _BASE_FILE).read_text(encoding="utf-8")))
    except FileNotFoundError:
        return named  # an adapter of another program
    except (OSError, ValueError):
        known = {}
    near = os.path.normpath(adapter.resolve() / str(known.get("path")))
    found = [place for place in ([] if given else [near]) + [named] if Path(place).is_dir()]
    for place in found:
        if _weights(Path(place)) == known.get("files"):
            here = os.path.relpath(place)
            return place if given or here.startswith(os.pardir) else here
    if not found and not named.startswith((".", "/", "~")) and named.count("/") == 1:
        return named  # it was published since
    raise InputError(
        "the adapter was trained over another model" if found else "the adapter's base is missing",
        where=str(adapter),
        expected="the weights whose hashes are in its base_model.json",
        found=f"others in {found[0]}" if found else f"nothing at {near}, nor at {named}",
        do="put the base back; to take another for it, remove base_model.json, and name the other "
        "in models: {NAME: {path: BASE, adapter: FOLDER}}",
    )


def _weights(folder: Path) -> dict[str, str]:
    files = sorted(folder.glob("*.safetensors"))
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
    """Folder or hub id of a model's tokenizer: that of its base, if an adapter has none.

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


OPTION = "--trust-remote-code"

_allowed = False


def allow(value: bool) -> None:
    """Set whether this process may run a model's own code."""
    global _allowed
    _allowed = value


def allowed() -> bool:
    """Whether this process may run a model's own code: the value of `trust_remote_code`."""
    return _allowed


def passed_on() -> list[str]:
    """The option again, for a command that this process starts."""
    return [OPTION] if _allowed else []


def is_asked_for(error: Exception) -> bool:
    """Whether a loader failed because it may not run a model's code."""
    return not _allowed and "trust_remote_code" in str(error)


@contextlib.contextmanager
def naming(path: str, what: str) -> Iterator[None]:
    """Turn whatever a loader raises into one message that names the model."""
    try:
        yield
    except Exception as error:
        here = Path(path).exists()
        if is_asked_for(error):
            raise InputError(
                f"the {what} needs Python code of its own",
                where=path,
                do=f"read that code; where you trust it, `dominie {OPTION} …` runs it",
            ) from error
        raise (InputError if here else hub_error(error))(
            f"the {what} cannot be loaded",
            where=path,
            found=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}",
            do="check that the folder is complete and of one model"
            if here
            else "check the name, the network and `hf auth login`",
        ) from error
