"""Prepares and checks stages before they run: rows, tokenizers, models, tasks and fingerprints.

Data that a stage makes are tokenised when they exist. Until then the stages that read them, and
those after these, are checked without them, and have no fingerprint.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from dominie.core.display import Display
from dominie.core.distributed import is_sharded, world_size
from dominie.core.errors import InputError
from dominie.core.run_reader import read_stage
from dominie.data.assistant_spans import unended
from dominie.data.rows import PreparedSource, held_out_of_all, prepare
from dominie.data.sources import content_fingerprint
from dominie.models.attention_hooks import check_attention
from dominie.models.matching import check_context, check_same_tokens, check_vocabulary, token_map
from dominie.recipe.on_policy_checks import on_policy_notices
from dominie.recipe.shown_answers import shown_answer_notices
from dominie.recipe.stage_config import same_token_teachers, span_sources
from dominie.recipe.validate import stage_order
from dominie.stages.fingerprint import digest
from dominie.stages.run_folder import ChatTokenizers, RunFolder, check_whole
from dominie.stages.stage_kind import Prepared, stage_kind
from dominie.stages.task_checks import check_task, check_tasks
from dominie.stages.teacher_caches import self_teaching_notice
from dominie.training.loss_forward import check_fused_layers
from dominie.training.settings import training_arguments
from dominie.training.source_weights import Shares, planned_shares, share_lines
from dominie.training.stage_sources import attention_pairs
from dominie.training.stop_at import check_bounds

if TYPE_CHECKING:
    from dominie.stages.train import PreparedTraining, TrainStage


class Preparation:
    """Prepares stages one after the other, each knowing the fingerprints of those before it.

    Attributes:
        tokenizers: by the name of a model or stage.
        fingerprints: of models, and of the results of stages; empty if that is not known yet.
        shares: of the sources of each stage that mixes some, as they will come out.
    """

    def __init__(self, folder: RunFolder, display: Display) -> None:
        self.folder, self.recipe, self.display = folder, folder.recipe, display
        self.tokenizers = ChatTokenizers(folder, display)
        self.fingerprints: dict[str, str] = {}
        self.shares: dict[str, tuple[Shares, ...]] = {}
        self._waits: dict[str, tuple[str, ...]] = {}
        self._rows: dict[tuple[str, int, tuple[str, ...]], dict[str, PreparedSource]] = {}
        self._shown: set[str] = set()

    def all(self) -> list[Prepared]:
        """Prepare every stage, in the order in which they run, and check the tasks.

        Raises:
            InputError: data, templates, tokenizers, models or tasks that cannot be used.
        """
        stages = [self.stage(name) for name in stage_order(self.recipe, where=self.recipe.name)]
        for note in check_tasks(self.folder, self.tokenizers, self.exists):
            self.display.once(f"warning: {note}")
        return stages

    def stage(self, name: str) -> Prepared:
        """Prepare a stage; those that it reads models or data of come first."""
        stage = stage_kind(self.recipe, name)
        for model in stage.models:
            if model not in self.recipe.stages:
                identity = self.folder.info(model).identity()
                self.fingerprints.setdefault(model, digest(identity))
        missing = [source for source in stage.sources if not self.exists(source)]
        before = [each for model in stage.models for each in self._waits.get(model, ())]
        self._waits[name] = tuple(dict.fromkeys([*before, *missing]))
        prepared = stage.prepare(name, self)
        if self._waits[name]:
            prepared = dataclasses.replace(prepared, fingerprint="", waits_for=self._waits[name])
        self.fingerprints[name] = prepared.fingerprint
        return prepared

    def check_made(self, name: str) -> None:
        """Check the tasks that ask questions of data which a stage has just made."""
        evaluation = self.recipe.evaluate
        for task in evaluation.tasks.values() if evaluation else ():
            if task.source == name and self.recipe.stages[name].makes == "data":
                for note in check_task(self.folder, task, self.tokenizers):
                    self.display.once(f"warning: {note}")

    def rows(self, name: str, max_length: int) -> dict[str, PreparedSource]:
        """Tokenise for a stage: the recipe's sources, and the data that were made before it.

        What one of them holds out, the stage trains on in none of the others. Data that do not
        exist yet are left out; stages that ran before them cannot have held out their prompts.
        """
        made = self._made_before(name)
        key = (self.tokenizers.fingerprint(name), max_length, made)
        if key not in self._rows:
            names = [*self.recipe.data, *made]
            self._rows[key] = self._tokenised(names, self.tokenizers.of(name), max_length)
        return self._rows[key]

    def held_out(self, name: str) -> frozenset[bytes]:
        """Hashes of the prompts that a stage may not learn from: those left out of its `rows`."""
        names = [*self.recipe.data, *self._made_before(name)]
        sources = {source: self.folder.source(source) for source in names}
        contents = {source: content_fingerprint(sources[source]) for source in names}
        return frozenset(held_out_of_all(sources, contents, self.folder.rows))

    def content(self, source: str) -> str:
        """A hash of what a source holds; empty if it does not exist yet."""
        return content_fingerprint(self.folder.source(source)) if self.exists(source) else ""

    def notice(self, line: str) -> None:
        """Show a line, once however often a stage is prepared."""
        if line not in self._shown:
            self._shown.add(line)
            self.display.line(line)

    def notices(self, name: str, prepared: PreparedTraining) -> None:
        """Show what a stage does otherwise than its recipe may lead one to expect.

        Raises:
            InputError: the loss has a router term and the student no router.
        """
        stage = prepared.stage
        longest = stage.rollout_settings.max_new_tokens
        if shares := planned_shares(prepared.stage_sources, stage.train, answers=longest):
            self.shares[name] = shares
            for told in share_lines(name, shares, stage.train):
                self.notice(told)
        for told in on_policy_notices(name, stage, prepared.stage_sources, self.tokenizers):
            self.notice(told)
        tokenizer, info = self.tokenizers.of(name), self.folder.info
        for told in shown_answer_notices(name, stage, prepared.stage_sources, tokenizer, info):
            self.notice(told)
        if line := _router_notice(self.folder, name, stage):
            self.notice(line)
        if stage.train.precision == "bf16" and not torch.accelerator.is_available():
            self.notice(
                f"{name}: precision: bf16 on a CPU is mostly slower than fp32, the default (1.8 to "
                "29 times as measured; faster for wide models on processors with AMX); set "
                "train.precision=fp32"
            )
        if (after := unended(tokenizer)) is not None:
            self.notice(
                f"warning: {name}: under its chat template an answer ends with {after!r}, and no "
                f"token of the tokenizer ends it: the trained model will not stop where its "
                f"answers end; use a chat template whose end-of-turn token the tokenizer has (its "
                f"own is {tokenizer.eos_token!r}), or a tokenizer that has the template's tokens"
            )
        rounded = self.folder.info(stage.student).rounded
        if rounded and stage.student not in self.recipe.stages:
            self.notice(
                f"warning: {name}: {stage.student} is a GGUF file whose weights are rounded to "
                f"{rounded}; it is trained from these, and what rounding has cost is not won back "
                "by itself. From the model before it was quantised it would start better"
            )
        if self.folder.info(name).config is not self.folder.info(stage.student).config:
            self.notice(
                f"{name}: {stage.student} has one weight for its head and its embedding; adapters "
                "change it, so that each gets its own; what is written has both"
            )
        if line := self_teaching_notice(name, stage):
            self.notice(line)

    def _made_before(self, name: str) -> tuple[str, ...]:
        """The stages whose data exist when this one runs."""
        before = self.recipe.needed(self.recipe.needs(name))
        return tuple(s for s in self.recipe.made if s in before and self.exists(s))

    def exists(self, source: str) -> bool:
        """Whether a source can be read: data that a stage makes, if they are those it would make.

        Raises:
            InputError: they were made, and are damaged.
        """
        if source in self.recipe.data:
            return True
        path, fingerprint = self.folder.stage(source), self.fingerprints.get(source)
        record = read_stage(path) if fingerprint else {}
        same = record.get("fingerprint") == fingerprint and record.get("status") == "done"
        if not (fingerprint and same and (path / "data").is_dir()):
            return False
        check_whole(path, record, self.display)
        return True

    def _tokenised(
        self, names: list[str], tokenizer: Any, max_length: int
    ) -> dict[str, PreparedSource]:
        sources = {name: self.folder.source(name) for name in names}
        with self.display.progress("conversations") as advance:
            rows = prepare(
                sources,
                tokenizer,
                max_length=max_length,
                cache=self.folder.rows,
                progress=lambda name, read: advance(read, None, name),
            )
        for name, source in rows.items():
            self.notice(source.summary.line(name))
            if columns := source.summary.columns_line(name):
                self.notice(columns)
            for lost in source.summary.left_out:
                self.notice(lost.line(name, source.summary.kept))
        return rows


def check_tokens(
    folder: RunFolder, tokenizers: ChatTokenizers, name: str, stage: TrainStage
) -> None:
    """Refuse teachers of other tokens than the student's, but for those whose tokens are mapped."""
    tokenizer = tokenizers.of(name)
    for other in same_token_teachers(stage):
        where, theirs = f"stages.{name}, model {other}", tokenizers.of(other)
        if other not in folder.recipe.served and folder.spec(other).map_tokens:
            size = folder.info(other).need("vocabulary", use="mapping tokens")
            token_map(tokenizer, theirs, size=size, where=where)
        else:
            check_same_tokens(tokenizer, theirs, where=where)


def _router_notice(folder: RunFolder, name: str, stage: TrainStage) -> str | None:
    """Refuse a router term for a dense student; return a notice of a term that is left out."""
    terms = [stage.loss_on(source).router for source in stage.active]
    if not any(term and (term.weight or term.z_weight) for term in terms):
        return None
    student = folder.info(stage.student)
    if student.experts is None:
        raise InputError(
            "the loss has a router term and the student no router",
            where=f"stages.{name}.loss.router",
            expected="a student that is a mixture of experts",
            found=f"{stage.student}, which is dense",
            do="remove the term, or make a mixture of the student with an upcycle stage",
        )
    if student.experts == student.experts_per_token and any(term and term.weight for term in terms):
        return (
            f"{name}: each token goes to all {student.experts} experts, so that load balancing is "
            "the same whatever the router does; it is left out"
        )
    return None


def check_training(folder: RunFolder, prepared: PreparedTraining) -> None:
    """Refuse rows, settings and models that are not compatible."""
    stage, where = prepared.stage, f"stages.{prepared.name}"
    known = [name for name in stage.active if name in prepared.sources]
    for name in known:
        if not len(prepared.sources[name].train):
            raise InputError(
                "a source is trained on that is held out whole",
                where=f"{where}.data.{name}",
                do=f"lower data.{name}.test_fraction or validation_fraction",
            )
    trained = [source for source in prepared.stage_sources if source.share]
    validated = len(known) < len(stage.active) or any(len(x.validation) for x in trained)
    if stage.train.loss_decides and not validated:
        raise InputError(
            "there is nothing to choose the best model by",
            where=f"{where}.train",
            expected="a validation split of a source that is trained on, for keep and patience",
            do=f"set data.{stage.active[0]}.validation_fraction",
        )
    if stage.train.measures_forgetting and is_sharded(stage.train.arguments):
        raise InputError(
            "forgetting cannot be measured while FSDP or DeepSpeed cuts up the student's weights",
            where=f"{where}.train.{'stop_at' if stage.train.stop_at else 'forgetting'}",
            do="leave it out, and measure the models with a task: metric: forgetting",
        )
    if stage.train.stop_at is not None:
        check_bounds(
            stage.train.stop_at,
            prepared.stage_sources,
            unknown={*stage.active} - {*known},
            where=f"{where}.train.stop_at.forgetting",
        )
    record, done = read_stage(folder.stage(prepared.name)), ("done", prepared.fingerprint)
    known_good = (record.get("status"), record.get("fingerprint")) == done
    if not known_good and (stage.train.arguments or stage.train.precision != "fp32"):
        # Transformers looks through them now, rather than when the stages before have been trained.
        training_arguments(stage.train, folder.stage(prepared.name), steps=1, ranks=world_size())
    stage.train.micro_batches_ahead(world_size())
    models = {name: folder.info(name) for name in stage.models}
    check_fused_layers(stage.train.arguments, models[stage.student], where=f"{where}.train")
    rows = [split for s in prepared.sources.values() for split in (s.train, s.validation)]
    highest = max((split.highest_id for split in rows), default=0)
    for name, model in models.items():
        if name in span_sources(stage):
            continue  # it reads rows of its own
        check_context(model, stage.train.max_length, where=f"{where}, model {name}")
        check_vocabulary(model, highest, where=f"{where}, model {name}")
    try:
        pairs = attention_pairs(models[stage.student], models, trained)
    except InputError as error:
        raise error.within(where) from None
    if pairs.teachers and not known_good:
        check_attention(models[stage.student], pairs.student_layers)
        for name in sorted(pairs.teachers):
            check_attention(models[name], pairs.teacher_layers)


def check_alike(folder: RunFolder, models: Sequence[str], *, where: str) -> None:
    """Refuse to combine weights of models whose configurations show them to differ in shape."""
    shape = ("family", "hidden_size", "layers", "heads", "vocabulary")
    seen = {}
    for name in models:
        info = folder.info(name)
        seen[name] = {key: info.need(key, use="combining weights") for key in shape}
    first = next(iter(seen))
    for name, found in seen.items():
        apart = [key for key in shape if found[key] != seen[first][key]]
        if apart:
            raise InputError(
                "models of different shape cannot be combined",
                where=where,
                expected=", ".join(f"{key} {seen[first][key]}" for key in apart)
                + f" as in {first}",
                found=", ".join(f"{key} {found[key]}" for key in apart) + f" in {name}",
                do="name models that were trained from one model",
            )
