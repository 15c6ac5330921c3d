"""The kind of stage that merges the weights of several models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from dominie.models.merging import Merge
from dominie.models.spec import Model, Placement
from dominie.recipe.stage_config import register_stage_kind
from dominie.stages.stage_kind import Prepared, WeightsKind


@register_stage_kind
@dataclass(frozen=True, kw_only=True)
class MergeStage(WeightsKind):
    """A model made of the weights of several; nothing is trained.

    Attributes:
        merge: which models, and how.
        placement: where the weights of its model are held when it teaches another stage.
    """

    kind: ClassVar[str] = "merge"
    key: ClassVar[str | None] = "merge"
    relation: ClassVar[str] = "merge"
    merge: Merge
    placement: Placement | None = None

    @property
    def models(self) -> list[str]:
        """Every model that is read; the first gives configuration and tokenizer."""
        return self.merge.sources

    def write(self, models: Mapping[str, Model], folder: Path, prepared: Prepared) -> int:
        """Write the sum of the weights."""
        from dominie.models.merging import merge_models

        del prepared
        return merge_models(self.merge, models, folder)
