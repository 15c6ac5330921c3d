"""What is said, before it runs, of a stage whose student answers itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from dominie.core.errors import InputError
from dominie.data.assistant_spans import ends_of_turn
from dominie.data.chat_template import ChatTemplate
from dominie.training.rollouts import MOST_BYTES, prompt_of

if TYPE_CHECKING:
    from dominie.stages.prepare import Preparation
    from dominie.stages.train import PreparedTraining

#: Prompts of a source that are looked at.
_LOOKED_AT = 500


def on_policy_notices(preparation: Preparation, prepared: PreparedTraining) -> Iterator[str]:
    """Say how many answers are written, and warn of teachers and prompts that do not suit."""
    stage, name = prepared.stage, prepared.name
    answered = [s for s in prepared.stage_sources if s.on_policy]
    if not answered:
        return
    rollouts = stage.rollout_settings
    fractions = ", ".join(f"{100 * s.on_policy:.3g} % of {s.name}" for s in answered)
    yield (
        f"{name}: the student answers {fractions}, up to {rollouts.max_new_tokens} tokens each; "
        f"the answers are kept in {name}/rollouts, the oldest go beyond {MOST_BYTES / 1e9:.2g} GB"
    )
    yield from _teacher_notices(preparation, name, {s.teacher for s in answered if s.teacher})
    ending = _generation_prompt(preparation.tokenizers.of(name))
    for source in answered:
        prompts = [prompt_of(row) for row in islice(source.train, _LOOKED_AT)]
        lengths = [len(prompt) for prompt in prompts]
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


def _teacher_notices(preparation: Preparation, name: str, teachers: set[str]) -> Iterator[str]:
    """Warn of teachers that were trained under another template, or to end with another token."""
    tokenizers = preparation.tokenizers
    student = tokenizers.of(name)
    ends = ends_of_turn(student)
    for teacher in sorted(teachers):
        other = tokenizers.of(teacher)
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
