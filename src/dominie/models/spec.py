"""Which model, and how it is held."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

from dominie.errors import InputError

Placement = Literal["device", "cpu", "8bit", "4bit", "sharded", "cached"]
Bits = Literal["8bit", "4bit"]


def rounded(placement: Placement) -> Bits | None:
    """To how many bits weights are rounded that are placed so."""
    return next((bits for bits in get_args(Bits) if bits == placement), None)


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model to load.

    Attributes:
        path: a folder, a hub id, or a name of the toy world.
        adapter: folder or hub id of a peft adapter laid over it.
        chat_template: file of a Jinja chat template, for a model that has none or another one.
        revision: branch, tag or commit on the hub.
        dtype: dtype of frozen weights; `auto` is the checkpoint's own. A student that is trained
            in full is held in fp32 whatever this says.
        attention: implementation transformers uses underneath; `auto` is its own choice, sdpa
            wherever the family has it.
        map_tokens: the model, as a teacher, has the student's tokens under other ids: its embedding
            and head are reordered to the student's.
        placement: where the weights of a frozen model lie; nothing said is `device`. `cpu` keeps
            its layers in main memory and each on the device while it runs; `8bit` and `4bit`
            quantise; `sharded` shares the layers out over the processes; `cached` is `cache: true`
            on every source of a stage that can learn from what the model predicts.
        quantize: another way to say `placement: 8bit` or `4bit`.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "strict": True}
    path: str
    adapter: str | None = None
    chat_template: str | None = None
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
    def held(self) -> Placement:
        """Where its weights lie while it is frozen: the one word on `placement` and `quantize`."""
        return self.placement or self.quantize or "device"

    @property
    def bits(self) -> Bits | None:
        """How its weights are quantised, which alone among placements changes what it says."""
        return rounded(self.held)

    def check_trainable(self, *, adapters: bool, where: str | None = None) -> None:
        """Refuse a student that is placed as only a frozen model can be.

        Args:
            adapters: whether it is trained under LoRA.
            where: what the message names, its path where nothing is said.

        Raises:
            InputError: says what to change.
        """
        if self.bits and not adapters:
            raise InputError(
                "quantised weights cannot be trained",
                where=where or self.path,
                do="set train.lora, or remove placement (or quantize)",
            )
        if self.held not in ("device", *get_args(Bits)):
            raise InputError(
                f"a model with placement: {self.held} cannot be trained",
                where=where or self.path,
                do="give the student under models a name of its own, without placement; how it is "
                "shared out is the engine's (--engine)",
            )

    def located(self, place: Callable[[str], str]) -> Model:
        """The same with every path of its own as `place` has it."""
        return dataclasses.replace(
            self,
            path=place(self.path),
            adapter=self.adapter and place(self.adapter),
            chat_template=self.chat_template and place(self.chat_template),
        )
