"""Which model, where its weights are placed, and whether code beside it may run."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

from dominie.core.errors import InputError, hub_error
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
        path: a folder, a hub id, a GGUF file, or a name of the toy world.
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
    except InputError:  # one already
        raise
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
