"""Everything that can be known before a stage is trained: its rows, its tokens, its fingerprint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dominie.data.conversations import Conversation
from dominie.data.rows import PreparedSource, prepare
from dominie.data.splits import read_split
from dominie.data.store import Rows
from dominie.display import Display
from dominie.errors import InputError
from dominie.evaluation.exams import exam
from dominie.evaluation.harness import check_harness
from dominie.evaluation.likelihood import candidates
from dominie.evaluation.metrics import check_rows
from dominie.evaluation.questions import check_group
from dominie.evaluation.scoring import UNGENERATED
from dominie.models.agreement import (
    check_context,
    check_one_tokenizer,
    check_same_tokens,
    check_vocabulary,
)
from dominie.models.attention_interface import check_attention
from dominie.models.loading import load_config
from dominie.models.token_map import token_map
from dominie.processes.ranks import ranks
from dominie.recipe import AnyStage, Stage, Task, UpcycleStage
from dominie.recipe.check import stage_order
from dominie.running.chat_tokenizers import ChatTokenizers
from dominie.running.dependencies import making_dependencies, training_dependencies
from dominie.running.experts import check_router, check_upcycle
from dominie.running.fingerprints import digest, making_parts, model_fingerprint, training_parts
from dominie.running.folder import RunFolder
from dominie.training.arguments import training_arguments
from dominie.training.lessons import Lessons, layer_pairs
from dominie.training.settings import TrainSettings


@dataclass(frozen=True)
class Prepared:
    """A stage whose models are known to fit each other, before any is loaded.

    Attributes:
        name: of the stage.
        stage: its part of the recipe.
        tokenizer: of the model it makes, with a chat template.
        fingerprint: of everything its model depends on.
        depends: the same by name, to tell what has changed.
    """

    name: str
    stage: AnyStage
    tokenizer: Any
    fingerprint: str
    depends: Mapping[str, Any] = field(default_factory=dict, kw_only=True)


@dataclass(frozen=True)
class PreparedTraining(Prepared):
    """A stage that trains, its data ready.

    Attributes:
        sources: the sources it learns from, then those it only watches.
        teachers: the fingerprints of its teachers.
    """

    stage: Stage
    sources: Mapping[str, PreparedSource]
    teachers: Mapping[str, str]

    @property
    def lessons(self) -> list[Lessons]:
        """What the stage teaches, then what it only watches."""
        stage, limit = self.stage, self.stage.train.evaluate_rows
        taught = [
            Lessons(
                name=name,
                train=self.sources[name].train,
                validation=self.sources[name].validation.first(limit),
                share=stage.data[name].share,
                terms=stage.loss_on(name),
                teacher=stage.teacher_on(name),
                cache=cache_name(stage, name),
            )
            for name in stage.active
        ]
        watched = [
            Lessons(name=name, train=(), validation=source.validation.first(limit), share=0.0)
            for name, source in self.sources.items()
            if name not in stage.active and len(source.validation)
        ]
        return taught + watched


@dataclass(frozen=True)
class PreparedUpcycle(Prepared):
    """A stage that makes a mixture of experts, with what its gates are found by.

    Attributes:
        rows: conversations of the source that its gates read; None where they read none.
    """

    stage: UpcycleStage
    rows: Rows | None


def cache_name(stage: Stage, source: str) -> str | None:
    """Who speaks in the place of the teacher on a source; None where it does itself.

    Sources that share a teacher share its cache, if they compare at one temperature.
    """
    if stage.cache_on(source) is None:
        return None
    prediction = stage.loss_on(source).prediction
    temperature = prediction.temperature if prediction else 1.0
    return f"{stage.teacher_on(source)}, cached at temperature {temperature:g}"


def prepare_stages(folder: RunFolder, display: Display) -> list[Prepared]:
    """Read and tokenise all data and compare all tokenizers, before any stage is trained.

    Returns:
        The stages, each after those it learns from.

    Raises:
        InputError: data, templates, tokenizers or models that cannot be used.
    """
    recipe = folder.recipe
    tokenizers = ChatTokenizers(folder, display)
    rows_of = _RowsByTokens(folder, display)
    fingerprints: dict[str, str] = {}
    prepared: list[Prepared] = []
    for name in stage_order(recipe, where=recipe.name):
        stage, tokenizer = recipe.stages[name], tokenizers.of(name)
        for other in stage.models[1:]:
            where, spec = f"stages.{name}, model {other}", folder.model(other)
            if not isinstance(stage, Stage):
                check_one_tokenizer(tokenizer, tokenizers.of(other), where=where)
            elif spec.map_tokens:
                size = load_config(spec).vocab_size
                token_map(tokenizer, tokenizers.of(other), size=size, where=where)
            else:
                check_same_tokens(tokenizer, tokenizers.of(other), where=where)
        for model in stage.models:
            if model not in recipe.stages:
                fingerprints.setdefault(model, model_fingerprint(folder.model(model)))
        if not isinstance(stage, Stage):
            _check_alike(folder, stage.models, where=f"stages.{name}.{stage.kind}")
        if not isinstance(stage, Stage):
            rows = None
            if isinstance(stage, UpcycleStage):
                if notice := check_upcycle(folder, name):
                    display.line(notice)
                rows = _gate_rows(folder, name, tokenizers, rows_of)
            read = None if rows is None else rows.digest
            made_of = making_parts(recipe, name, fingerprints, read)
            fingerprint = fingerprints[name] = digest(*made_of)
            depends = making_dependencies(*made_of)
            prepared.append(
                PreparedUpcycle(name, stage, tokenizer, fingerprint, rows, depends=depends)
                if isinstance(stage, UpcycleStage)
                else Prepared(name, stage, tokenizer, fingerprint, depends=depends)
            )
            continue
        made = rows_of(tokenizer, tokenizers.fingerprint(name), stage.train.max_length)
        sources = {s: made[s] for s in [*stage.active, *(s for s in made if s not in stage.active)]}
        parts = training_parts(
            recipe,
            name,
            rows={source: _digest(made[source], stage.train) for source in stage.active},
            models=fingerprints,
        )
        fingerprints[name] = digest(*parts)
        taught_by = {stage.teacher_on(source) for source in stage.active}
        training = PreparedTraining(
            name,
            stage,
            tokenizer,
            fingerprints[name],
            sources,
            teachers={teacher: fingerprints[teacher] for teacher in taught_by if teacher},
            depends=training_dependencies(*parts, tokenizers.fingerprint(name)),
        )
        _check_fit(folder, training)
        if notice := check_router(folder, name):
            display.line(notice)
        prepared.append(training)
    _check_tasks(folder, tokenizers)
    return prepared


def _digest(source: PreparedSource, train: TrainSettings) -> str:
    """Of the rows a stage's model depends on: those that it learns, and those that choose it."""
    if not train.validation_decides:
        return source.train.digest
    return f"{source.train.digest}, {source.validation.first(train.evaluate_rows).digest}"


def _gate_rows(
    folder: RunFolder, name: str, tokenizers: ChatTokenizers, rows_of: _RowsByTokens
) -> Rows | None:
    """The conversations that an upcycle stage finds its gates by, if it does."""
    stage = folder.recipe.stages[name]
    assert isinstance(stage, UpcycleStage)
    if (source := stage.upcycle.source) is None:
        return None
    length = folder.recipe.train.max_length
    rows = rows_of(tokenizers.of(name), tokenizers.fingerprint(name), length)[source].train
    config, where = load_config(folder.model(folder.root(name))), f"stages.{name}.upcycle.source"
    check_context(config, length, where=where)
    check_vocabulary(config, rows.highest_id, where=where)
    return rows


def _check_fit(folder: RunFolder, prepared: PreparedTraining) -> None:
    """Refuse what rows, settings and configurations show not to go together."""
    stage, where = prepared.stage, f"stages.{prepared.name}"
    for name in stage.active:
        if not len(prepared.sources[name].train):
            raise InputError(
                "a source is trained on that is held out whole",
                where=f"{where}.data.{name}",
                do=f"lower data.{name}.test_fraction or validation_fraction",
            )
    lessons = prepared.lessons
    if stage.train.validation_decides and not any(
        len(lesson.validation) for lesson in lessons if lesson.share
    ):
        raise InputError(
            "there is nothing to tell the best model by",
            where=f"{where}.train",
            expected="a validation split of a source that is trained on, for keep and patience",
            do=f"set data.{stage.active[0]}.validation_fraction",
        )
    # Transformers looks through them now, rather than when the stages before have been trained.
    training_arguments(stage.train, folder.stage(prepared.name), steps=1, ranks=ranks())
    configs = {model: load_config(folder.model(folder.root(model))) for model in stage.models}
    highest = max(
        max(s.train.highest_id, s.validation.highest_id) for s in prepared.sources.values()
    )
    for model, config in configs.items():
        check_context(config, stage.train.max_length, where=f"{where}, model {model}")
        check_vocabulary(config, highest, where=f"{where}, model {model}")
    taught = [lesson for lesson in lessons if lesson.share]
    pairs, _ = layer_pairs(configs[stage.student], configs, taught)
    if pairs:
        check_attention(configs[stage.student], {student for student, _ in pairs})
        compared = {x.teacher for x in taught if x.teacher and x.terms.weighs("attention")}
        for name in sorted(compared):
            check_attention(configs[name], {teacher for _, teacher in pairs})


def _check_alike(folder: RunFolder, models: Sequence[str], *, where: str) -> None:
    """Refuse to combine weights of models whose configurations show them to differ in shape."""
    shape = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    seen = {}
    for name in models:
        config = load_config(folder.model(folder.root(name)))
        seen[name] = {key: getattr(config, key, None) for key in shape}
    first = next(iter(seen))
    for name, found in seen.items():
        apart = [key for key in shape if found[key] != seen[first][key]]
        if apart:
            raise InputError(
                "models of different shape cannot be made one",
                where=where,
                expected=", ".join(f"{key} {seen[first][key]}" for key in apart)
                + f" as in {first}",
                found=", ".join(f"{key} {found[key]}" for key in apart) + f" in {name}",
                do="name models that were trained from one model",
            )


def _check_tasks(folder: RunFolder, tokenizers: ChatTokenizers) -> None:
    """Refuse tasks that would fail after everything has been trained."""
    evaluation = folder.recipe.evaluate
    if evaluation is None:
        return
    for name in evaluation.models.values():
        if name not in folder.recipe.stages:
            load_config(folder.model(name))
    for name, task in evaluation.tasks.items():
        if task.lm_eval is not None:
            check_harness(task.lm_eval, where=f"evaluate.tasks.{name}")
        if task.source is not None:
            _check_questions(task, read_split(folder.source(task.source), task.split))
        if task.teacher is None:
            continue
        for model in evaluation.models.values():
            check_same_tokens(
                tokenizers.of(model),
                tokenizers.of(task.teacher),
                where=f"evaluate.tasks.{name}, model {model}, teacher {task.teacher}",
            )
    for name, endpoint in evaluation.endpoints.items():
        endpoint.key(where=f"evaluate.endpoints.{name}")
    for name, benchmark in evaluation.benchmarks.items():
        exam(benchmark)
        if not folder.replies(name).exists():
            benchmark.judge.key(where=f"evaluate.benchmarks.{name}.judge")


def _check_questions(task: Task, conversations: Sequence[Conversation]) -> None:
    check_group(conversations, task.by)
    if task.metric == "choice":
        for conversation in conversations[: task.limit]:
            candidates(conversation, task.options)
    elif task.metric not in UNGENERATED:
        check_rows(task, conversations[: task.limit])


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
