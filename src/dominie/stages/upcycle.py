"""The kind of stage that makes a mixture of experts of a dense model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from dominie.core.errors import InputError
from dominie.models.spec import Model, Placement
from dominie.models.upcycling import Upcycle
from dominie.recipe.stage_config import info_of_stage, register_stage_kind
from dominie.stages.stage_kind import Prepared, WeightsKind

if TYPE_CHECKING:
    from dominie.models.info import ModelInfo
    from dominie.stages.prepare import Preparation


@register_stage_kind
@dataclass(frozen=True, kw_only=True)
class UpcycleStage(WeightsKind):
    """A dense model made a mixture of experts; nothing is trained.

    Attributes:
        upcycle: which model, and how.
        placement: where the weights of its model are held when it teaches another stage.
    """

    kind: ClassVar[str] = "upcycle"
    key: ClassVar[str | None] = "upcycle"
    upcycle: Upcycle
    placement: Placement | None = None

    @property
    def models(self) -> list[str]:
        """The dense model, which gives configuration and tokenizer, then its siblings."""
        return self.upcycle.sources

    @property
    def hub_tags(self) -> list[str]:
        """Tags for the model card."""
        return ["moe"]

    def model_info(self, name: str, of: Callable[[str], ModelInfo]) -> ModelInfo:
        """Describe the mixture that it makes; `of` describes the models that it reads."""
        from dominie.models.moe import upcycled_info

        settings, dense = self.upcycle, of(self.upcycle.model)
        mixture = upcycled_info(
            dense, experts=settings.experts, experts_per_token=settings.experts_per_token
        )
        return info_of_stage(name, mixture, dtype=dense.dtype)

    def check_models(self, name: str, preparation: Preparation) -> None:
        """Refuse to make a mixture of what is none of the dense families; warn of equal experts."""
        from dominie.models.moe import mixture_of

        folder, where = preparation.folder, f"stages.{name}.upcycle"
        for model in self.models:
            if folder.info(model).experts is not None:
                raise InputError(
                    "this model is a mixture of experts already",
                    where=where,
                    found=model,
                    do="name the dense model it was made of, or train it as it is",
                )
        dense = folder.info(self.upcycle.model).need("config", use="making a mixture of experts")
        mixture_of(dense, where=where)
        if not self.upcycle.separates:
            preparation.notice(
                f"{name}: nothing but rounding makes its experts differ. Equal experts behind a "
                "gate of zeros get equal gradients, and the router none. Set gate, noise, reset or "
                "siblings"
            )
        elif self.upcycle.experts_per_token == 1:
            preparation.notice(
                f"{name}: the weight of a single chosen expert is always 1, so that no loss but "
                "the router's own trains its gate"
            )

    def write(self, models: Mapping[str, Model], folder: Path, prepared: Prepared) -> int:
        """Write the mixture's weights."""
        from dominie.models.upcycling import upcycle_model

        rows = [source.train for source in prepared.sources.values()]
        return upcycle_model(self.upcycle, models, folder, rows=rows[0] if rows else ())
