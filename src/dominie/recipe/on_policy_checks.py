"""Checks what a stage says of answers that its student writes itself, and what is told of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from dominie.core.distributed import is_fsdp2, is_sharded
from dominie.core.errors import InputError
from dominie.data.assistant_spans import ends_of_turn, unended
from dominie.data.chat_template import ChatTemplate
from dominie.data.row_store import turn_of
from dominie.training.rollouts import MOST_BYTES

if TYPE_CHECKING:
    from dominie.recipe import TrainStage
    from dominie.recipe.schema import Recipe
    from dominie.training.stage_sources import StageSource

#: Prompts of a source that are looked at.
LOOKED_AT = 500


def check_on_policy(recipe: Recipe, stage: TrainStage, *, where: str) -> None:
    """Refuse answers that nobody marks, that do not fit, or that no one could generate.

    Raises:
        InputError: names the key.
    """
    if stage.rollouts is not None and all(m.on_policy is None for m in stage.data.values()):
        raise InputError(
            "the stage says how its student answers, and it answers nothing",
            where=f"{where}.rollouts",
            expected="a source with on_policy, the fraction of its conversations that are answered",
            do=f"set data.{stage.active[0]}.on_policy, or remove rollouts",
        )
    for name in stage.active:
        source, fraction = recipe.data.get(name), stage.data[name].on_policy or 0.0
        here = f"{where}.data.{name}"
        if source is not None and source.prompts and fraction != 1.0:
            raise InputError(
                "a source of prompts has no answers to learn from",
                where=f"{here}.on_policy",
                expected="1.0: the student writes every answer",
                found="nothing" if stage.data[name].on_policy is None else f"{fraction:g}",
                do=f"set it, or give the conversations answers and remove data.{name}.prompts",
            )
        if fraction:
            _check_marked(recipe, stage, name, where=here)
    if not any(stage.data[name].on_policy for name in stage.active):
        return
    longest, fits = stage.rollout_settings.max_new_tokens, stage.train.max_length
    if longest >= fits:
        raise InputError(
            "an answer may be longer than a conversation",
            where=f"{where}.rollouts.max_new_tokens",
            expected=f"less than train.max_length, now {fits}",
            found=str(longest),
            do="lower it, or raise train.max_length",
        )
    if stage.rollout_settings.engine is not None:
        _check_server(stage, where=where)
    local = stage.rollout_settings.engine is None
    if is_sharded(stage.train.arguments) and not (local and is_fsdp2(stage.train.arguments)):
        raise InputError(
            "the student cannot answer while DeepSpeed or FSDP1 cuts up its weights"
            if local
            else "a server cannot be given an adapter that FSDP or DeepSpeed cuts up",
            where=f"{where}.train",
            do="use --engine fsdp2 and rollouts.engine: local, or train it whole on each device",
        )


def _check_server(stage: TrainStage, *, where: str) -> None:
    """Refuse a student that a server cannot be given at each step."""
    lora = stage.train.lora
    if lora is None:
        raise InputError(
            "a server gets the student's adapter at each step, and the student trains all weights",
            where=f"{where}.rollouts.engine",
            expected="a stage with train.lora",
            do="set train.lora, or leave engine out: answers are then generated in this process",
        )
    if lora.modules_to_save:
        raise InputError(
            "a server loads no modules that are trained in full beside the adapters",
            where=f"{where}.train.lora.modules_to_save",
            found=", ".join(lora.modules_to_save),
            do="remove them, or leave rollouts.engine out",
        )


def _check_marked(recipe: Recipe, stage: TrainStage, name: str, *, where: str) -> None:
    """Refuse a source whose teacher cannot mark answers that nobody has seen before."""
    loss, teacher = stage.loss_on(name), stage.teacher_on(name)
    if teacher is None:
        raise InputError(
            "the student's answers need a teacher to mark them, and the loss has none",
            where=f"{where}.on_policy",
            expected="a loss that compares with a teacher, such as prediction",
            do="give the source a teacher and a prediction loss, or remove on_policy",
        )
    if loss.weighs("spans"):
        raise InputError(
            "a teacher with another tokenizer reads answers that are known before training, and "
            "not those that the student writes",
            where=f"{where}.on_policy",
            do="remove on_policy from this source, or name a teacher with the student's tokenizer",
        )
    if loss.weighs("next_token"):
        raise InputError(
            "next_token would have the student learn its own answers by heart",
            where=f"{where}.on_policy",
            expected="a loss that only compares with the teacher",
            found="a next_token term",
            do="remove the term from this source; for labels of the data, name the same file as a "
            "second source without on_policy",
        )
    if is_cached(recipe, stage, name):
        raise InputError(
            "a cached teacher has predicted the answers of the data, and says nothing about those "
            "that the student writes",
            where=where,
            expected="a teacher in memory",
            found=f"{teacher}, cached",
            do=f"set {where.partition(': ')[2]}.cache=false, or remove on_policy",
        )


def is_cached(recipe: Recipe, stage: TrainStage, name: str) -> bool:
    """Whether a source has a cache in its teacher's place."""
    teacher = stage.teacher_on(name)
    if teacher in recipe.served:
        return bool(stage.data[name].cache)  # without a word it is asked while the stage trains
    placed = teacher is not None and recipe.placement(teacher) == "cached"
    return stage.cache_on(name) is not None or (placed and stage.data[name].cache is None)


def on_policy_notices(
    name: str, stage: TrainStage, sources: Sequence[StageSource], tokenizers: Any
) -> Iterator[str]:
    """Say how many answers are written, and warn of teachers and prompts that do not suit.

    Args:
        name: of the stage.
        stage: its part of the recipe.
        sources: with their rows.
        tokenizers: with chat templates, `of` the name of a model or stage.

    Raises:
        InputError: answers could not end, a teacher does not know how, or no row asks for one.
    """
    answered = [source for source in sources if source.on_policy]
    if not answered:
        return
    rollouts = stage.rollout_settings
    fractions = ", ".join(f"{100 * s.on_policy:.3g} % of {s.name}" for s in answered)
    yield (
        f"{name}: the student answers {fractions}, {rollouts.lengths}; "
        f"the answers are kept in {name}/rollouts, the oldest go beyond {MOST_BYTES / 1e9:.2g} GB"
    )
    yield from _teacher_notices(tokenizers, name, {s.teacher for s in answered if s.teacher})
    ending = _generation_prompt(tokenizers.of(name))
    for source in answered:
        prompts = [turn_of(row).prompt for row in islice(source.train, LOOKED_AT)]
        lengths = [len(prompt) for prompt in prompts]
        yield from _without_prompt(name, source, lengths, stage.train.max_length)
        if ending and any(prompt[-len(ending) :] != ending for prompt in prompts):
            yield (
                f"warning: {name}: prompts of {source.name} do not end as the chat template asks "
                "for an answer, where its {% generation %} marks leave out how an answer begins; "
                "the student goes on from there"
            )
        room = stage.train.max_length - np.array(lengths or [0])
        if (short := float((room < rollouts.max_new_tokens).mean())) > 0:
            yield (
                f"warning: {name}: {100 * short:.3g} % of the prompts of {source.name} leave less "
                f"room than rollouts.max_new_tokens, and their answers are cut off earlier; raise "
                f"train.max_length, now {stage.train.max_length}"
            )


def _without_prompt(
    name: str, source: StageSource, lengths: Sequence[int], most: int
) -> Iterator[str]:
    """Tell of conversations that keep the answers of the data; refuse if all of them do."""
    kept = sum(not 0 < length < most for length in lengths)
    if kept and kept == len(lengths):
        raise InputError(
            "no conversation has a prompt that the student could answer",
            where=f"stages.{name}.data.{source.name}.on_policy",
            expected=f"prompts of 1 to {most - 1} tokens before the assistant's turn",
            found=f"prompts of {min(lengths)} to {max(lengths)} tokens",
            do="remove on_policy, or raise train.max_length",
        )
    if kept:
        yield (
            f"warning: {name}: {100 * kept / len(lengths):.3g} % of the conversations of "
            f"{source.name} have no prompt of 1 to {most - 1} tokens, and keep the data's answers"
        )


def _teacher_notices(tokenizers: Any, name: str, teachers: set[str]) -> Iterator[str]:
    """Warn of teachers that were trained under another template, or to end with another token.

    Raises:
        InputError: the student's answers end with no token, or with one that a teacher has not.
    """
    student, where = tokenizers.of(name), f"stages.{name}"
    ends = ends_of_turn(student)
    if not ends and (after := unended(student)) is not None:
        raise InputError(
            "the student's answers would never end: its chat template ends them with no token of "
            "its own",
            where=where,
            found=f"{after!r} after an answer",
            do="give the student a chat template whose end-of-turn token the tokenizer has "
            "(models.NAME.chat_template), or remove on_policy",
        )
    for teacher in sorted(teachers):
        other = tokenizers.of(teacher)
        if (end := student.convert_ids_to_tokens(ends[:1])) and end[0] not in other.get_vocab():
            raise InputError(
                "the teacher does not know the token that ends the student's answers",
                where=where,
                expected=f"{end[0]!r} among the tokens of {teacher}",
                do="give the student a chat template that ends answers with a token of both "
                "(models.NAME.chat_template), or name another teacher",
            )
        if other is student or other.chat_template == student.chat_template:
            continue
        theirs = ends_of_turn(other)
        if theirs[:1] != ends[:1]:
            shown = [
                each.convert_ids_to_tokens(list(of[:1]))
                for each, of in ((other, theirs), (student, ends))
            ]
            yield (
                f"warning: {name}: {teacher} ends its answers with {_listed(shown[0])} and the "
                f"student with {_listed(shown[1])}: the teacher tells nothing of where an answer "
                "ends; give both one chat template (models.NAME.chat_template)"
            )
        else:
            yield (
                f"warning: {name}: {teacher} has another chat template than the student, and reads "
                "conversations in the student's; what it says of them may be worse than it could be"
            )


def _generation_prompt(tokenizer: Any) -> list[int]:
    """The tokens with which the chat template asks for an answer; none if it cannot be told."""
    template, question = ChatTemplate(tokenizer), [{"role": "user", "content": "How many?"}]
    with suppress(InputError):
        plain = template.text(question, None, where="")
        asked = template.text(question, None, where="", generation_prompt=True)
        if asked.startswith(plain):
            ids: list[int] = tokenizer(asked[len(plain) :], add_special_tokens=False)["input_ids"]
            return ids
    return []


def _listed(tokens: list[str]) -> str:
    return repr(tokens[0]) if tokens else "no token"
