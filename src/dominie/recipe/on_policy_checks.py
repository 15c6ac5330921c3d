"""Checks what a stage says of answers that its student writes itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dominie.core.distributed import is_sharded
from dominie.core.errors import InputError

if TYPE_CHECKING:
    from dominie.recipe import TrainStage
    from dominie.recipe.schema import Recipe


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
    if is_sharded(stage.train.arguments):
        raise InputError(
            "the student cannot answer while FSDP or DeepSpeed cuts up its weights",
            where=f"{where}.train",
            do="train it whole on each device, or with LoRA; or set on_policy: 0",
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
    if loss.weighs("next_token"):
        raise InputError(
            "next_token would have the student learn its own answers by heart",
            where=f"{where}.on_policy",
            expected="a loss that only compares with the teacher",
            found="a next_token term",
            do="remove the term from this source; for labels of the data, name the same file as a "
            "second source without on_policy",
        )
    placed = recipe.placement(teacher) == "cached" and stage.data[name].cache is None
    if stage.cache_on(name) or placed:
        raise InputError(
            "a cached teacher has predicted the answers of the data, and says nothing about those "
            "that the student writes",
            where=where,
            expected="a teacher in memory",
            found=f"{teacher}, cached",
            do=f"set {where.partition(': ')[2]}.cache=false, or remove on_policy",
        )
