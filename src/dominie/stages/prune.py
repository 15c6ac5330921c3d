"""The kind of stage that cuts a smaller model out of a larger one."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from dominie.core.errors import InputError
from dominie.models.info import describe, info_of
from dominie.models.pruning import Prune, pruned_config
from dominie.models.spec import Model, Placement
from dominie.recipe.stage_config import info_of_stage, register_stage_kind
from dominie.stages.stage_kind import StageRun, WeightsKind, export

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dominie.data.batch import Batch
    from dominie.data.rows import PreparedSource, Rows
    from dominie.models.info import ModelInfo
    from dominie.models.pruned_weights import Kept
    from dominie.stages.prepare import Preparation


@register_stage_kind
@dataclass(frozen=True, kw_only=True)
class PruneStage(WeightsKind):
    """A model with parts of a larger one left out; nothing is trained.

    Attributes:
        prune: which model, and what is kept of it.
        placement: where the weights of its model are held when it teaches another stage.
    """

    kind: ClassVar[str] = "prune"
    key: ClassVar[str | None] = "prune"
    prune: Prune
    placement: Placement | None = None

    @property
    def hub_tags(self) -> list[str]:
        """Tags for the model card."""
        return ["pruned"]

    @property
    def loaded(self) -> list[str]:
        """The larger model, if it reads conversations."""
        return self.models if self.prune.source else []

    def model_info(self, name: str, of: Callable[[str], ModelInfo]) -> ModelInfo:
        """Describe the smaller model; which layers `influence` keeps is not known before."""
        larger = of(self.prune.model)
        config = pruned_config(self.prune, larger, where=f"stages.{name}.prune")
        return info_of_stage(name, info_of(config), dtype=larger.dtype)

    def check_models(self, name: str, preparation: Preparation) -> None:
        """Refuse a model that cannot be pruned, or has no more than is to be kept."""
        from dominie.models.pruned_weights import check_text_model

        preparation.folder.info(name)
        if (spec := preparation.folder.info(self.prune.model).spec) is not None:
            check_text_model(spec, where=f"stages.{name}.prune.model")

    def rows(self, name: str, preparation: Preparation) -> dict[str, PreparedSource]:
        """Tokenise the source; refuse one that has nothing to read."""
        found = super().rows(name, preparation)
        for source, rows in found.items():
            reads = self.prune.keep == "influence" or self.prune.parts
            if reads and not len(rows.train):
                raise InputError(
                    "the source holds all conversations out, so that none can be read",
                    where=f"stages.{name}.prune.source",
                    found=source,
                    do=f"lower data.{source}.test_fraction or validation_fraction",
                )
            if not len(rows.validation):
                preparation.notice(
                    f"{name}: {source} holds nothing out for validation, so that the loss before "
                    f"recovery is not measured; set data.{source}.validation_fraction"
                )
        return found

    def make(self, run: StageRun) -> dict[str, Any]:
        """Choose what is kept, write it, and measure what the cut costs before any recovery."""
        from dominie.models.pruned_weights import prune_model

        model = run.folder.model(self.prune.model)
        rows = next(iter(run.prepared.sources.values()), None)
        kept, found = self._chosen(model, rows, run)
        parameters = export(run, lambda to: prune_model(self.prune, model, to, kept))
        if rows and len(rows.validation):
            smaller = Model(path=str(run.path / self.makes), attention=model.attention)
            found["loss_after"] = self._loss(_loaded(smaller), rows, run)
            gc.collect()
        return {"parameters": parameters, **found}

    def _chosen(
        self, spec: Model, rows: PreparedSource | None, run: StageRun
    ) -> tuple[Kept, dict[str, Any]]:
        """Choose what is kept, by forward passes of the larger model if need be.

        Returns:
            What is kept, and for `stage.json`: that, whole and kept widths, and the larger model's
            loss on what the source holds out.
        """
        from dominie.models.importance import part_scores, strongest
        from dominie.models.pruned_weights import Kept
        from dominie.models.pruning import heads_in_group

        prune, info = self.prune, describe(spec, name=self.prune.model)
        depth = info.need("layers", use="pruning")
        layers, parts = prune.chosen_layers(depth), prune.parts
        found: dict[str, Any] = {"layers_before": depth, "widths": prune.widths(info)}
        chosen: dict[str, Tensor] = {}
        if rows and (layers is None or parts or len(rows.validation)):
            model = _loaded(spec)
            order = torch.randperm(len(rows.train), generator=torch.Generator().manual_seed(0))
            read = order[: prune.rows].tolist()
            if layers is None:
                batches = _batches(model, rows.train, read, run)
                layers, found["angles"] = self._least_turned(depth, model, batches)
            if parts:
                scores = part_scores(model, _batches(model, rows.train, read, run), parts)
                counts = dict(_counts(prune, heads_in_group(info)))
                chosen = {
                    part: strongest(of, counts[part])
                    for part, of in vars(scores).items()
                    if of is not None
                }
            if len(rows.validation):
                found["loss_before"] = self._loss(model, rows, run)
            del model
            gc.collect()
        assert layers is not None, "without rows they do not decide"
        for part in chosen.keys() & {"key_heads", "experts"}:
            found[f"kept_{part}"] = chosen[part][layers].tolist()
        return Kept(layers=layers, **chosen), {"kept_layers": layers, **found}

    def _least_turned(
        self, depth: int, model: Any, batches: Iterator[Batch]
    ) -> tuple[list[int], dict[str, float]]:
        """The layers but for the block that turns hidden states least; angles by first layer."""
        from dominie.models.importance import block_angles
        from dominie.models.pruning import without_block

        layers = self.prune.layers
        assert isinstance(layers, int), "checked when the recipe was loaded"
        starts = self.prune.block_starts(depth)
        angles = block_angles(model, batches, starts, depth - layers)
        start = min(angles, key=lambda first: (angles[first], first))
        shown = {str(first): round(angle, 6) for first, angle in angles.items()}
        return without_block(depth, layers, start), shown

    def _loss(self, model: Any, rows: PreparedSource, run: StageRun) -> float:
        """The mean next-token loss of a model on the held-out conversations."""
        from dominie.models.importance import next_token_loss

        order = range(min(self.prune.rows, len(rows.validation)))
        return round(next_token_loss(model, _batches(model, rows.validation, order, run)), 6)

    def describe(self, record: Mapping[str, Any]) -> str:
        """Describe a finished stage in one line."""
        (model,), kept, depth = record["models"], record["kept_layers"], record["layers_before"]
        parts = [f"{model} with {len(kept)} of its {depth} layers"]
        if len(kept) < depth:
            parts[0] += f" ({_ranges(kept)})"
        widths = record["widths"].items()
        parts += [f"{name} {now} of {before}" for name, (before, now) in widths]
        if "loss_after" in record:
            parts.append(
                f"next-token loss {record['loss_after']:.3f} nats before recovery, "
                f"{record['loss_before']:.3f} before the cut"
            )
        parts += [f"{record['seconds']:.0f} s", f"{record['parameters'] / 1e6:.2f}M parameters"]
        return ", ".join(parts)


def _counts(prune: Prune, group: int) -> Iterator[tuple[str, int]]:
    """How many parts are kept, by their names among the scores."""
    if prune.heads:
        yield "key_heads", prune.heads // group
    for name, count in (
        ("neurons", prune.intermediate_size),
        ("channels", prune.hidden_size),
        ("experts", prune.experts),
    ):
        if count:
            yield name, count


def _loaded(spec: Model) -> Any:
    """Load a model to run it on this process's device."""
    from dominie.models.loading import load_frozen

    return load_frozen(spec, device="cuda" if torch.cuda.is_available() else "cpu")


def _batches(model: Any, rows: Rows, order: Sequence[int], run: StageRun) -> Iterator[Batch]:
    """Conversations of a source in batches, one to a row; progress is shown."""
    from dominie.data.batch import collate
    from dominie.models.head import padding_for
    from dominie.teachers.cache_writer import batch_tokens, in_batches

    padding, done = padding_for(model), 0
    with run.display.progress(f"{run.name}: conversations") as advance:
        for members in in_batches(rows, order, batch_tokens(model)):
            yield collate([(0, row) for row in members], padding=padding)
            done += len(members)
            advance(done, len(order), "")


def _ranges(numbers: Sequence[int]) -> str:
    """Write ascending numbers briefly: 0-3, 8, 10-11."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)
