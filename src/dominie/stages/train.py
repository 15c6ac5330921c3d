"""The kind of stage that trains a student."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from dominie.core.references import ModelName, SourceName
from dominie.losses.terms import LossTerms
from dominie.models.spec import Placement
from dominie.recipe.stage_config import (
    AnyTeacher,
    MixedSource,
    PrivilegedTeacher,
    info_of_stage,
    register_stage_kind,
)
from dominie.stages.stage_kind import Prepared, StageKind, StageRun, pair_rows
from dominie.teachers.cache_sampling import CacheSettings
from dominie.training.rollouts import RolloutSettings
from dominie.training.settings import TrainSettings

if TYPE_CHECKING:
    from dominie.models.info import ModelInfo
    from dominie.recipe.schema import Recipe
    from dominie.stages.prepare import Preparation
    from dominie.training.stage_sources import StageSource
    from dominie.training.train_stage import Trained


@register_stage_kind
@dataclass(frozen=True, kw_only=True)
class TrainStage(StageKind):
    """A student, the data it is trained on, its teachers and its losses.

    Attributes:
        student: the model that is trained: a stage, whose model is trained further, or another.
        data: the sources it is trained on, with their shares.
        loss: what is minimised; on a source that has a loss of its own, that one instead.
        teacher: of the sources that name no teacher of their own, by name or with what it reads.
        cache: whether and how the teachers' predictions are stored before training.
        rollouts: how the student writes the answers of its sources that are `on_policy`.
        train: how it trains; single keys replace those of the recipe's `train`.
        placement: where the weights of its model are held when it teaches another stage, as of
            a model under `models`.
    """

    kind: ClassVar[str] = "train"
    key: ClassVar[str | None] = None
    trains: ClassVar[bool] = True
    past: ClassVar[str] = "trained"
    served: ClassVar[frozenset[str]] = frozenset({"teacher"})
    student: ModelName
    data: dict[SourceName, MixedSource]
    loss: LossTerms | None = None
    teacher: AnyTeacher | None = None
    cache: CacheSettings | None = None
    rollouts: RolloutSettings | None = None
    train: TrainSettings = field(default_factory=TrainSettings)
    placement: Placement | None = None

    def loss_on(self, source: str) -> LossTerms:
        """The loss on a source of this stage."""
        loss = self.data[source].loss or self.loss
        assert loss is not None, "checked when the recipe was loaded"
        return loss

    def teacher_on(self, source: str) -> str | None:
        """The name of the teacher on a source, None if its loss needs none."""
        if not self.loss_on(source).needs_teacher:
            return None
        teacher = self.data[source].teacher or self.teacher
        return teacher.model if isinstance(teacher, PrivilegedTeacher) else teacher

    def shown_on(self, source: str) -> str | None:
        """How right answers are written into the prompts of a source's teacher; None if not."""
        teacher = self.data[source].teacher or self.teacher
        if not isinstance(teacher, PrivilegedTeacher) or not self.teacher_on(source):
            return None
        return teacher.text

    def cache_on(self, source: str) -> CacheSettings | None:
        """How the teacher on a source is cached; None if it is in memory."""
        wanted = self.data[source].cache
        if wanted is None:
            wanted = self.cache is not None and self.cache.enabled
        if not wanted or self.teacher_on(source) is None:
            return None
        return self.cache or CacheSettings()

    def cache_name(self, source: str) -> str | None:
        """The cache that stands for the teacher on a source; None if the teacher is in memory.

        Sources that share a teacher share its cache, if they compare at one temperature.
        """
        if self.cache_on(source) is None:
            return None
        prediction = self.loss_on(source).prediction
        temperature = prediction.temperature if prediction else 1.0
        return f"{self.teacher_on(source)}, cached at temperature {temperature:g}"

    @property
    def rollout_settings(self) -> RolloutSettings:
        """How the student answers, if it does."""
        return self.rollouts or RolloutSettings()

    @property
    def active(self) -> list[str]:
        """Sources with a share above zero."""
        return [name for name, mixed in self.data.items() if mixed.share > 0]

    @property
    def cached(self) -> list[str]:
        """Active sources whose teacher is replaced by a cache of what it predicts."""
        return [source for source in self.active if self.cache_on(source)]

    @property
    def models(self) -> list[str]:
        """Every model the stage needs: the student, then the teachers."""
        teachers = filter(None, map(self.teacher_on, self.active))
        return list(dict.fromkeys([self.student, *teachers]))

    @property
    def sources(self) -> list[str]:
        """The sources it is trained on."""
        return self.active

    @property
    def begins_from(self) -> list[str]:
        """The student."""
        return [self.student]

    @property
    def names_in_record(self) -> dict[str, Any]:
        """The student, and the teacher on each source."""
        teachers = {source: self.teacher_on(source) for source in self.active}
        shown = {"shown": [source for source in self.active if self.shown_on(source)]}
        return {"student": self.student, "teachers": teachers, **(shown if shown["shown"] else {})}

    @property
    def hub_tags(self) -> list[str]:
        """Tags for the model card."""
        teachers = {self.teacher_on(source) for source in self.active} - {None}
        tags = ["knowledge-distillation", "domain-alignment-from-expert"]
        return tags[: min(len(teachers), 2)]

    def model_info(self, name: str, of: Callable[[str], ModelInfo]) -> ModelInfo:
        """Describe the student after training, or its adapter."""
        from dominie.models.adapters import config_under_lora

        student, lora = of(self.student), self.train.lora
        config = config_under_lora(student.config, lora)
        info = info_of_stage(name, student, dtype=self.train.precision, config=config)
        if lora is None or lora.merge:
            return info
        return dataclasses.replace(info, base=student.base, adapter=name)

    def resolved(self, recipe: Recipe) -> TrainStage:
        """The stage with `placement: cached` of its teachers written out as `cache: true`.

        A source that compares more than predictions keeps its teacher on the device, and what the
        stage or a source sets for its cache has precedence.
        """

        def on_source(name: str, mixed: MixedSource) -> MixedSource:
            teacher = self.teacher_on(name)
            given = mixed.cache is not None or (self.cache is not None and not self.cache.enabled)
            if given or teacher is None or self.loss_on(name).needs_live_teacher:
                return mixed
            cached = recipe.placement(teacher) == "cached"
            return dataclasses.replace(mixed, cache=True) if cached else mixed

        from dominie.recipe.served import with_served_teachers

        stage = with_served_teachers(recipe, self)
        data = {name: on_source(name, mixed) for name, mixed in stage.data.items()}
        return dataclasses.replace(stage, data=data)

    def check(self, recipe: Recipe, name: str, *, where: str) -> None:
        """Refuse a mix of nothing, a loss without its teacher, a cache that cannot serve."""
        from dominie.recipe.validate import check_training_stage

        check_training_stage(recipe, name, self, where=where)

    def prepare(self, name: str, preparation: Preparation) -> PreparedTraining:
        """Check tokens, rows and models of a stage; find its fingerprint."""
        from dominie.recipe.validate import reference_sources
        from dominie.stages import fingerprint
        from dominie.stages.prepare import check_tokens, check_training

        check_tokens(preparation.folder, preparation.tokenizers, name, self)
        rows, tokens = preparation.rows(name, self.train.max_length), preparation.tokenizers
        sources = {each: rows[each] for each in (*self.active, *rows) if each in rows}
        pairs, keys = pair_rows(preparation, name, self, sources)
        known, digests = preparation.fingerprints, fingerprint.rows_digests(self, sources, keys)
        parts = fingerprint.training_parts(preparation.recipe, name, rows=digests, models=known)
        prepared = PreparedTraining(
            name,
            self,
            tokens.of(name),
            fingerprint.digest(*parts),
            sources=sources,
            teachers={teacher: known[teacher] for teacher in self.models[1:]},
            depends=fingerprint.training_dependencies(*parts, tokens.fingerprint(name)),
            references=reference_sources(preparation.recipe, self),
            pairs=pairs,
        )
        check_training(preparation.folder, prepared)
        preparation.notices(name, prepared)
        return prepared

    def run(self, run: StageRun) -> dict[str, Any]:
        """Fill the caches and train, on every rank."""
        from dominie.core.hardware import use_free_cores
        from dominie.stages.served_caches import finished, live_teachers, stored_or_asked
        from dominie.stages.teacher_caches import fill_caches
        from dominie.training.callbacks import StepProgress
        from dominie.training.stage_sources import StageTraining
        from dominie.training.train_stage import StageModels, shared_base_of, train_stage

        prepared, folder, display = run.prepared, run.folder, run.display
        assert isinstance(prepared, PreparedTraining)
        run.begin(threads=use_free_cores(run.earlier.get("threads")), data={})
        sources, served = prepared.stage_sources, folder.recipe.served.keys()
        live = {source.teacher for source in sources if source.cache is None} - served
        teachers = {name: folder.teacher(name) for name in self.models if name in live}
        stored = fill_caches(folder, prepared, display)
        asked = live_teachers(folder, prepared, display)
        shared = shared_base_of(student := folder.model(self.student), teachers, self.train)
        if names := " and ".join(shared.adapters):
            display.line(f"{run.name}: {names} and the student share one base, held once")
        for name, why in shared.apart.items():
            display.line(f"{run.name}: {name} is loaded beside the student's base: {why}")
        with display.progress(run.name) as advance:
            trained = train_stage(
                StageTraining(
                    folder=run.path,
                    sources=sources,
                    settings=self.train,
                    rollouts=self.rollout_settings,
                ),
                StageModels(
                    student=student,
                    tokenizer=prepared.tokenizer,
                    teachers=teachers,
                    caches=stored_or_asked(stored, asked),
                    shared=shared,
                    pairs=prepared.pairs,
                ),
                callbacks=[StepProgress(advance)],
            )
        figures = {k: v for k, v in vars(trained).items() if v is not None and k != "token_shares"}
        data = {source: prepared.counts(source, trained) for source in self.active}
        return {**figures, **finished(asked), "data": data}

    def plan(self, recipe: Recipe, name: str, machine: Any, sizes: Mapping[str, Any]) -> Any:
        """Plan its memory and time on a machine."""
        from dominie.planning.plan import plan_training

        return plan_training(recipe, name, self, machine, sizes)

    def describe(self, record: Mapping[str, Any]) -> str:
        """Describe a finished stage in one line."""
        parts = [f"{name} {100 * of:.3g} %" for name, of in record.get("loss_shares", {}).items()]
        shares = f", the loss shared {', '.join(parts)}" if len(parts) > 1 else ""
        stopped = f"; stopped: {record['stopped']['why']}" if "stopped" in record else ""
        return (
            f"{record['steps']} steps, {record['supervised_tokens']:,} supervised tokens, "
            f"{record['seconds']:.0f} s, {record['parameters'] / 1e6:.2f}M parameters{shares}"
            f"{stopped}"
        )


@dataclass(frozen=True)
class PreparedTraining(Prepared):
    """A stage that trains, checked.

    Attributes:
        stage: its part of the recipe.
        teachers: the fingerprints of its teachers.
        sources: those it is trained on, then those it only validates on.
        references: sources whose teacher is what the student starts as.
    """

    stage: TrainStage
    teachers: Mapping[str, str] = field(kw_only=True)
    references: frozenset[str] = field(default=frozenset(), kw_only=True)

    @property
    def stage_sources(self) -> list[StageSource]:
        """The sources it is trained on, then those it only validates on."""
        from dominie.training.stage_sources import StageSource

        stage, limit, read = self.stage, self.stage.train.evaluate_rows, self.sources
        training = [
            StageSource(
                name=name,
                train=read[name].train if name in read else (),
                validation=read[name].validation.first(limit) if name in read else (),
                share=stage.data[name].share,
                terms=stage.loss_on(name),
                teacher=stage.teacher_on(name),
                cache=stage.cache_name(name),
                reference=name in self.references,
                on_policy=stage.data[name].on_policy or 0.0,
                shows=stage.shown_on(name),
            )
            for name in stage.active
        ]
        validated = [
            StageSource(name=name, train=(), validation=source.validation.first(limit), share=0.0)
            for name, source in read.items()
            if name not in stage.active and len(source.validation)
        ]
        return training + validated

    def counts(self, source: str, trained: Trained) -> dict[str, Any]:
        """Count what the stage read, kept and used of a source."""
        rows, shares = self.sources[source], self.stage.data
        return {
            **dataclasses.asdict(rows.summary),
            **{split: len(getattr(rows, split)) for split in ("train", "validation", "test")},
            "share": shares[source].share / sum(shares[s].share for s in self.stage.active),
            "token_share": trained.token_shares.get(source, 0.0),
            "loss_share": trained.loss_shares.get(source, 0.0),
        }
