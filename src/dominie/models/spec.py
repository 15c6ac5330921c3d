"""Which model, and how it is held."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal


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
        quantize: weights of a frozen model in 8 or 4 bits (bitsandbytes).
        offload: `cpu` keeps the layers of a frozen model in main memory, and moves each module to
            the device for as long as it runs; on a machine without one it only takes time.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "strict": True}
    path: str
    adapter: str | None = None
    chat_template: str | None = None
    revision: str | None = None
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    attention: str = "auto"
    map_tokens: bool = False
    quantize: Literal["8bit", "4bit"] | None = None
    offload: Literal["cpu"] | None = None

    def located(self, place: Callable[[str], str]) -> Model:
        """The same with every path of its own as `place` has it."""
        return dataclasses.replace(
            self,
            path=place(self.path),
            adapter=self.adapter and place(self.adapter),
            chat_template=self.chat_template and place(self.chat_template),
        )

    def __post_init__(self) -> None:
        if self.quantize and self.offload:
            raise ValueError("quantised weights cannot be offloaded: set quantize or offload")
