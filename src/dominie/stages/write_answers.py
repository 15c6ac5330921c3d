"""The kind of stage in which a model answers the prompts of a source, for later stages to learn."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from dominie.core.errors import InputError, RunError
from dominie.generation.prompt_answers import MOST_SEED, Answers
from dominie.recipe.stage_config import register_stage_kind
from dominie.stages.stage_kind import Prepared, StageKind, StageRun

if TYPE_CHECKING:
    from dominie.data.formats import Conversation, Message
    from dominie.generation.endpoint import ServedModel
    from dominie.generation.prompt_answers import Asked
    from dominie.recipe.schema import Recipe
    from dominie.stages.evaluation_models import EvaluationModels
    from dominie.stages.prepare import Preparation

_CHUNK = 64  # batches of answers between two records of the time that the stage has taken
_SHOWN = 3  # answers that `stage.json` shows


@dataclass(frozen=True)
class PreparedAnswers(Prepared):
    """An answers stage, checked.

    Attributes:
        held_out: hashes of the prompts that are not asked.
    """

    held_out: frozenset[bytes] = dataclasses.field(default=frozenset(), kw_only=True)


@register_stage_kind
@dataclass(frozen=True, kw_only=True)
class AnswersStage(StageKind):
    """Data that a model writes: its answers to the prompts of a source; nothing is trained.

    Attributes:
        answers: which model answers which prompts, and how.
    """

    kind: ClassVar[str] = "answers"
    key: ClassVar[str | None] = "answers"
    makes: ClassVar = "data"
    past: ClassVar[str] = "written"
    served: ClassVar[frozenset[str]] = frozenset({"model", "judge"})
    answers: Answers

    @property
    def names_in_record(self) -> dict[str, Any]:
        """The model that writes, and the source of the prompts."""
        return {"models": [self.answers.model], "source": self.answers.source}

    def conversations(self, sizes: Mapping[str, int]) -> int | None:
        """Count the answers, as if every prompt stood once and none of them were dropped."""
        known = sizes.get(self.answers.source)
        return None if known is None else known * self.answers.samples

    @property
    def hub_tags(self) -> list[str]:
        """Tags for the model card."""
        return ["synthetic"]

    def resolved(self, recipe: Recipe) -> AnswersStage:
        """The stage with the seed of the recipe written out, if it draws."""
        answers = self.answers
        drawn_here = answers.temperature and answers.model not in recipe.served
        if answers.seed is not None or not drawn_here:
            return self
        seed = recipe.train.seed % MOST_SEED
        return dataclasses.replace(self, answers=dataclasses.replace(answers, seed=seed))

    def check(self, recipe: Recipe, name: str, *, where: str) -> None:
        """Refuse an address in the place of a model, and what a server's settings overwrite."""
        from dominie.recipe.served import check_writer

        del name
        check_writer(recipe, self.answers, where=f"{where}.answers")

    def plan(self, recipe: Recipe, name: str, machine: Any, sizes: Mapping[str, Any]) -> Any:
        """Plan its memory and time on a machine, for answers of the greatest length."""
        from dominie.planning.plan import StagePlan, plan_answers

        if self.answers.model in recipe.served:  # nothing of it is held or computed here
            return StagePlan(name, self.kind, None, {}, machine, 0.0)
        return plan_answers(recipe, name, self, machine, sizes)

    def prepare(self, name: str, preparation: Preparation) -> PreparedAnswers:
        """Check that the model can answer; find the fingerprint from the prompts that are asked.

        Raises:
            InputError: no prompt, a template that fails on it, or no room for an answer.
        """
        from dominie.models.matching import check_context
        from dominie.stages.fingerprint import digest, making_dependencies, making_parts

        answers = self.answers
        served = answers.model in preparation.recipe.served
        tokenizer = None if served else preparation.tokenizers.of(answers.model)
        check_context(
            preparation.folder.info(answers.model),
            answers.max_new_tokens,
            where=f"stages.{name}.answers.max_new_tokens",
            do="lower max_new_tokens",
        )
        known = preparation.exists(answers.source)
        held_out = preparation.held_out(name) if known else frozenset[bytes]()
        content = self._content(name, preparation, held_out, tokenizer) if known else ""
        fingerprints, rows = preparation.fingerprints, {answers.source: content}
        settings, *parts = making_parts(preparation.recipe, name, fingerprints, rows)
        settings["answers"].pop("batch")
        if answers.system is None:
            settings["answers"].pop("system")  # as before there was one
        if answers.keep is None:
            settings["answers"].pop("keep")
        elif answers.keep.task is not None:
            settings["answers"]["keep"]["by"] = preparation.recipe.task(answers.keep.task)
        if not answers.keep_thoughts:
            settings["answers"].pop("keep_thoughts")
        template = "" if served else preparation.tokenizers.fingerprint(answers.model)
        depends = making_dependencies(settings, *parts)
        return PreparedAnswers(
            name,
            self,
            None,
            digest(settings, *parts, template),
            depends={**depends, "tokenizer": template},
            held_out=held_out,
        )

    def _content(
        self, name: str, preparation: Preparation, held_out: frozenset[bytes], tokenizer: Any
    ) -> str:
        """A hash of the prompts that are asked; they are counted, and the first is rendered."""
        from dominie.data.sources import conversation_digest
        from dominie.data.tokenization import prompt_ids
        from dominie.generation.prompt_answers import counted, prompts_of

        skipped, where = Counter[str](), f"stages.{name}.answers"
        source = preparation.folder.source(self.answers.source)
        prompts = prompts_of(source, held_out, skipped)
        if (first := next(prompts, None)) is None:
            raise InputError(
                "there is no prompt to answer",
                where=f"{where}.source: {source.name}",
                expected="conversations of its training split that no source holds out",
                found=counted(skipped),
            )
        if tokenizer is not None:
            prompt_ids(tokenizer, self.answers.said(first.messages), where=where)
        content, count = hashlib.sha256(), 0
        for prompt in chain([first], prompts):
            content.update(conversation_digest(prompt))
            count += 1
        preparation.notice(
            f"{name}: {self.answers.model} is asked {count:,} prompts of {source.name}, "
            f"{self.answers.samples} times each; left out: {counted(skipped)}"
        )
        return content.hexdigest()

    def run(self, run: StageRun) -> dict[str, Any]:
        """Write the answers that are not logged yet, shared out over the ranks; then the data.

        The log is beside the folder of the stage: what still holds of it after a change of the
        recipe is not written again.
        """
        from dominie.core.distributed import all_gather, broadcast_from_main
        from dominie.core.io import number
        from dominie.generation.prompt_answers import logged_answers, prompts_of
        from dominie.stages.evaluation_models import EvaluationModels

        assert isinstance(run.prepared, PreparedAnswers)
        begun, before = time.perf_counter(), number(run.earlier.get("seconds")) or 0.0

        def seconds() -> float:
            return round(before + time.perf_counter() - begun, 1)

        run.begin(seconds=seconds())
        logs, skipped = _logs(run), Counter[str]()
        source = run.folder.source(self.answers.source)
        prompts = list(prompts_of(source, run.prepared.held_out, skipped))
        if (served := run.folder.recipe.served.get(self.answers.model)) is not None:
            asked = broadcast_from_main(lambda: self._answered_by(served, run, prompts))
        else:
            models = EvaluationModels(run.folder, run.folder.trained_fingerprints(), run.display)
            asked = self._answered(run, prompts, models, lambda: run.begin(seconds=seconds()))
            models.free()
            all_gather(None)  # every rank has written its own

        def finish() -> dict[str, Any]:
            counts = {"prompts": len(prompts), "skipped": dict(skipped)}
            found = self._written(run, asked, logged_answers(logs))
            return {**self.names_in_record, **counts, **found, "seconds": seconds()}

        return broadcast_from_main(finish)

    def _answered(
        self,
        run: StageRun,
        prompts: Sequence[Conversation],
        models: EvaluationModels,
        on_chunk: Callable[[], None],
    ) -> list[Asked]:
        """Have the share of this rank written and logged; return all answers that are wanted."""
        from dominie.core.distributed import broadcast_from_main, rank, world_size
        from dominie.generation.local import LocalGenerator
        from dominie.generation.prompt_answers import logged_answers, write_answers
        from dominie.generation.reply_log import ReplyLog

        name, batch, logs = self.answers.model, self.answers.batch, _logs(run)
        generator = LocalGenerator(
            lambda: (models.load(name), models.tokenizers.of(name)),
            [models.weights_fingerprint(name), models.tokenizers.fingerprint(name)],
            batch=batch,
        )
        asked = self.answers.asked(prompts, generator)
        known = broadcast_from_main(lambda: set(logged_answers(logs)))
        mine = [each for each in asked if each.key not in known][rank() :: world_size()]
        log = ReplyLog(logs / f"{rank()}.jsonl")
        with run.display.progress(f"{run.name}: {name} answers {self.answers.source}") as advance:
            for start in range(0, len(mine), _CHUNK * batch):
                chunk = mine[start : start + _CHUNK * batch]
                write_answers(generator, chunk, log, at_once=batch)
                advance(start + len(chunk), len(mine), "")
                on_chunk()
        return asked

    def _answered_by(
        self, served: ServedModel, run: StageRun, prompts: Sequence[Conversation]
    ) -> list[Asked]:
        """Have a server write what is not logged yet; return all answers that are wanted."""
        from dominie.generation.prompt_answers import server_answers

        title = f"{run.name}: {self.answers.model} answers {self.answers.source}"
        with run.display.progress(title) as advance:
            return server_answers(
                self.answers, served, prompts, _logs(run), run.display.line, advance
            )

    def _written(
        self, run: StageRun, asked: Sequence[Asked], logged: Mapping[str, Mapping[str, Any]]
    ) -> dict[str, Any]:
        """Write the data; return what `stage.json` says of them."""
        from dominie.generation.prompt_answers import counted
        from dominie.stages.kept_answers import (
            declines,
            kept_answers,
            scorer_of,
            with_thoughts,
        )

        served = run.folder.recipe.served.get(self.answers.model)
        dropped: Counter[str] = Counter()
        kept, tokens, thoughts, declined = 0, 0, 0, 0
        shown: list[list[Message]] = []
        score = scorer_of(self.answers, run, _logs(run).with_name(f"{run.name}.verdicts.jsonl"))
        with run.result() as folder, (folder / "answers.jsonl").open("w", encoding="utf-8") as file:
            for each, answer, value in kept_answers(self.answers, asked, logged, dropped, score):
                whole = with_thoughts(answer) if self.answers.keep_thoughts else answer
                row = each.row(whole, self.answers.model, served)
                if value is not None:
                    row["origin"]["score"] = value
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                kept, tokens = kept + 1, tokens + (answer["tokens"] or 0)
                thoughts += bool(answer["thoughts"])
                declined += declines(answer["text"])
                shown += [row["messages"]] if len(shown) < _SHOWN else []
            if not kept:
                raise RunError(
                    "no answer can be learnt from",
                    where=f"stages.{run.name}.answers",
                    found=counted(dropped),
                    do=f"look at the answers in {_logs(run)}; raise max_new_tokens if they are "
                    "cut off, lower keep.at_least if they score less",
                )
        if served is not None:
            run.display.line(
                f"{run.name}: written by {served.model}: some licences and terms of use forbid to "
                "train other models on such answers, or ask for a name; read them before you train"
            )
        if thoughts and not self.answers.keep_thoughts:
            run.display.line(f"{run.name}: the thoughts before {thoughts:,} answers are left out")
        if declined:
            run.display.line(f"{run.name}: {declined:,} answers decline to answer; they are kept")
        return {
            "conversations": kept,
            "dropped": {reason: count for reason, count in dropped.items() if count},
            "thoughts_left_out": 0 if self.answers.keep_thoughts else thoughts,
            "declined": declined,
            "tokens": tokens,
            "mean_tokens": round(tokens / kept, 2),
            "samples": shown,
        }

    def describe(self, record: Mapping[str, Any]) -> str:
        """Describe a finished stage in one line."""
        from dominie.generation.prompt_answers import counted

        return (
            f"{record['conversations']:,} answers of {' and '.join(record['models'])} to "
            f"{record['prompts']:,} prompts of {record['source']}, "
            f"{record['mean_tokens']:.1f} tokens on average; dropped: "
            f"{counted(record['dropped'])}; {record['seconds']:.0f} s"
        )


def _logs(run: StageRun) -> Path:
    """The folder of the logs, one file a rank."""
    return run.folder.path / "cache" / "answers" / run.name
