"""Checks what a stage says of teachers that read right answers, and what is told of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from dominie.core.errors import InputError
from dominie.data.batch import filled
from dominie.data.row_store import turn_of
from dominie.models.matching import check_context
from dominie.recipe.on_policy_checks import LOOKED_AT, is_cached
from dominie.teachers.answer_shown import AnswerPrompt

if TYPE_CHECKING:
    from dominie.data.row_store import Rows
    from dominie.models.info import ModelInfo
    from dominie.recipe import TrainStage
    from dominie.recipe.schema import Recipe
    from dominie.training.stage_sources import StageSource


def check_shown_answers(recipe: Recipe, stage: TrainStage, *, where: str) -> None:
    """Refuse teachers that are to read answers where there are none, or that could not use them.

    Raises:
        InputError: names the key.
    """
    for name in stage.active:
        if stage.shown_on(name) is None:
            continue
        source, here = recipe.data.get(name), f"{where}.data.{name}"
        if source is not None and source.prompts:
            raise InputError(
                "the teacher is to read the right answers, and a source of prompts has none",
                where=f"{here}.teacher.shows",
                do=f"give the conversations answers and remove data.{name}.prompts, or name the "
                "teacher alone",
            )
        if stage.loss_on(name).weighs("spans"):
            raise InputError(
                "a teacher that is compared by spans reads the conversation in its own tokens, and "
                "no right answer with it",
                where=f"{here}.loss.spans",
                do="name the teacher without shows, or compare predictions of one tokenizer",
            )
        if stage.loss_on(name).weighs("attention"):
            raise InputError(
                "the attention of a teacher that reads more than the student cannot be compared "
                "with the student's: its tokens stand elsewhere",
                where=f"{here}.loss.attention",
                do="remove the attention term from this source",
            )
        if stage.teacher_on(name) in recipe.served:
            raise InputError(
                "a teacher behind a server reads what the student reads",
                where=here,
                expected="a teacher in memory, for answers that it alone is shown",
                found=f"{stage.teacher_on(name)}, behind a server",
                do="name a local model, or remove shows",
            )
        if is_cached(recipe, stage, name):
            raise InputError(
                "a cache keeps what a teacher predicts that reads what the student reads",
                where=here,
                expected="a teacher in memory",
                found=f"{stage.teacher_on(name)}, cached",
                do=f"set {here.partition(': ')[2]}.cache=false, or remove shows",
            )


def shown_answer_notices(
    name: str,
    stage: TrainStage,
    sources: Sequence[StageSource],
    tokenizer: Any,
    info: Callable[[str], ModelInfo],
) -> Iterator[str]:
    """Say what teachers read beside the questions; refuse what they cannot read.

    Args:
        name: of the stage.
        stage: its part of the recipe.
        sources: with their rows.
        tokenizer: the student's.
        info: what is known of a model, by its name.

    Raises:
        InputError: the chat template does not tell where a question ends, a conversation has no
            question, or what the teacher is to read is longer than its context.
    """
    for source in sources:
        if source.shows is None or source.teacher is None:
            continue
        where = f"stages.{name}.data.{source.name}"
        prompt = AnswerPrompt.of(tokenizer, source.shows, where=where)
        looked_at = list(islice(source.train, LOOKED_AT))
        try:
            for row in looked_at:
                prompt.row(filled([[(0, row)]]).spans[0])
        except ValueError as error:
            raise InputError(
                "the right answers cannot be written into the teacher's prompts",
                where=where,
                found=str(error),
                do="use a chat template that ends questions alike, or name the teacher alone",
            ) from None
        words, rows = prompt.before + prompt.after, cast("Rows", source.train)
        whole = stage.train.max_length if source.on_policy else rows.lengths
        check_context(
            info(source.teacher),
            len(words) + int(np.max(whole + rows.supervised_lengths, initial=0)),
            where=f"{where}, {source.teacher} with the right answer in its prompt",
            do=f"lower train.max_length, now {stage.train.max_length}",
        )
        more = [len(prompt.shown(turn_of(row).answer)) for row in looked_at]
        yield (
            f"{name}: {source.teacher} reads the right answers of {source.name}, and the student "
            f"does not: {np.mean(more or [0]):.0f} tokens more a question"
        )
        if unknown := sum(token == tokenizer.unk_token_id for token in words):
            yield (
                f"warning: {name}: the tokenizer does not know {unknown} of the {len(words)} "
                f"tokens around the answers that {source.teacher} reads; set {where}.teacher.text "
                "to words that it knows"
            )
