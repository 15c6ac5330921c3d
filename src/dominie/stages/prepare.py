"""Prepares stages: tokenizers with chat templates, rows, tokens, fingerprints."""

from __future__ import annotations

from typing import Any

from dominie.core.display import Display
from dominie.data.rows import PreparedSource, prepare
from dominie.data.store import Rows
from dominie.models.tokenizer_compat import (
    check_context,
    check_one_tokenizer,
    check_same_tokens,
    check_vocabulary,
    token_map,
)
from dominie.recipe import AnyStage, MergeStage, Stage, UpcycleStage
from dominie.recipe.validate import stage_order
from dominie.stages.compatibility import (
    check_alike,
    check_fit,
    check_router,
    check_tasks,
    check_upcycle,
)
from dominie.stages.fingerprint import (
    digest,
    making_dependencies,
    making_parts,
    training_dependencies,
    training_parts,
)
from dominie.stages.prepared import Prepared, PreparedTraining, PreparedUpcycle
from dominie.stages.run_folder import ChatTokenizers, RunFolder
from dominie.training.settings import TrainSettings


def prepare_stages(folder: RunFolder, display: Display) -> list[Prepared]:
    """Read and tokenise all data and compare all tokenizers, before any stage is trained.

    Returns:
        The stages, each after those it learns from.

    Raises:
        InputError: data, templates, tokenizers or models that cannot be used.
    """
    recipe = folder.recipe
    preparing = _Preparing(folder, display)
    stages = [preparing.stage(name) for name in stage_order(recipe, where=recipe.name)]
    check_tasks(folder, preparing.tokenizers)
    return stages


class _Preparing:
    """Stages one after the other, each knowing the fingerprints of those before it."""

    def __init__(self, folder: RunFolder, display: Display) -> None:
        self.folder, self.display = folder, display
        self.tokenizers = ChatTokenizers(folder, display)
        self._rows_of = _RowsByTokens(folder, display)
        self._fingerprints: dict[str, str] = {}

    def stage(self, name: str) -> Prepared:
        """A stage, its models known to have the same tokens."""
        stage = self.folder.recipe.stages[name]
        self._check_tokens(name, stage)
        for model in stage.models:
            if model not in self.folder.recipe.stages:
                identity = self.folder.info(model).identity()
                self._fingerprints.setdefault(model, digest(identity))
        prepared = (
            self._training(name, stage) if isinstance(stage, Stage) else self._making(name, stage)
        )
        self._fingerprints[name] = prepared.fingerprint
        return prepared

    def _check_tokens(self, name: str, stage: AnyStage) -> None:
        tokenizer = self.tokenizers.of(name)
        for other in stage.models[1:]:
            where, spec = f"stages.{name}, model {other}", self.folder.model(other)
            if not isinstance(stage, Stage):
                check_one_tokenizer(tokenizer, self.tokenizers.of(other), where=where)
            elif spec.map_tokens:
                size = self.folder.info(other).need("vocabulary", use="mapping tokens")
                token_map(tokenizer, self.tokenizers.of(other), size=size, where=where)
            else:
                check_same_tokens(tokenizer, self.tokenizers.of(other), where=where)

    def _making(self, name: str, stage: MergeStage | UpcycleStage) -> Prepared:
        """A stage that makes a model of others."""
        check_alike(self.folder, stage.models, where=f"stages.{name}.{stage.kind}")
        tokenizer = self.tokenizers.of(name)
        if isinstance(stage, MergeStage):
            parts = making_parts(self.folder.recipe, name, self._fingerprints)
            return Prepared(
                name, stage, tokenizer, digest(*parts), depends=making_dependencies(*parts)
            )
        if notice := check_upcycle(self.folder, name):
            self.display.line(notice)
        rows = self._gate_rows(name, stage)
        read = None if rows is None else rows.digest
        parts = making_parts(self.folder.recipe, name, self._fingerprints, read)
        return PreparedUpcycle(
            name, stage, tokenizer, digest(*parts), rows, depends=making_dependencies(*parts)
        )

    def _training(self, name: str, stage: Stage) -> PreparedTraining:
        """A stage that trains."""
        tokenizer, tokens = self.tokenizers.of(name), self.tokenizers.fingerprint(name)
        made = self._rows_of(tokenizer, tokens, stage.train.max_length)
        sources = {s: made[s] for s in [*stage.active, *(s for s in made if s not in stage.active)]}
        parts = training_parts(
            self.folder.recipe,
            name,
            rows={source: _digest(made[source], stage.train) for source in stage.active},
            models=self._fingerprints,
        )
        taught_by = {stage.teacher_on(source) for source in stage.active}
        prepared = PreparedTraining(
            name,
            stage,
            tokenizer,
            digest(*parts),
            sources,
            teachers={teacher: self._fingerprints[teacher] for teacher in taught_by if teacher},
            depends=training_dependencies(*parts, tokens),
        )
        check_fit(self.folder, prepared)
        if notice := check_router(self.folder, name):
            self.display.line(notice)
        return prepared

    def _gate_rows(self, name: str, stage: UpcycleStage) -> Rows | None:
        """The conversations that an upcycle stage finds its gates by, if it does."""
        if (source := stage.upcycle.source) is None:
            return None
        length = self.folder.recipe.train.max_length
        made = self._rows_of(self.tokenizers.of(name), self.tokenizers.fingerprint(name), length)
        rows = made[source].train
        model = self.folder.info(name)
        where = f"stages.{name}.upcycle.source"
        check_context(model, length, where=where)
        check_vocabulary(model, rows.highest_id, where=where)
        return rows


def _digest(source: PreparedSource, train: TrainSettings) -> str:
    """Of the rows a stage's model depends on: those that it learns, and those that choose it."""
    if not train.validation_decides:
        return source.train.digest
    return f"{source.train.digest}, {source.validation.first(train.evaluate_rows).digest}"


class _RowsByTokens:
    """Tokenised sources for each tokenizer and length, made once and told about once."""

    def __init__(self, folder: RunFolder, display: Display) -> None:
        self.folder, self.display = folder, display
        self._made: dict[tuple[str, int], dict[str, PreparedSource]] = {}

    def __call__(
        self, tokenizer: Any, fingerprint: str, max_length: int
    ) -> dict[str, PreparedSource]:
        key = (fingerprint, max_length)
        if key not in self._made:
            self._made[key] = self._prepared(tokenizer, max_length)
        return self._made[key]

    def _prepared(self, tokenizer: Any, max_length: int) -> dict[str, PreparedSource]:
        sources = {name: self.folder.source(name) for name in self.folder.recipe.data}
        with self.display.progress("conversations") as advance:
            made = prepare(
                sources,
                tokenizer,
                max_length=max_length,
                cache=self.folder.rows,
                progress=lambda name, read: advance(read, None, name),
            )
        for name, source in made.items():
            self.display.line(source.summary.line(name))
        return made
