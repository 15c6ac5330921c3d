"""A teacher that reads the right answer in its prompt, which the student does not.

The teacher may be the student's own old self: it predicts better where it knows the answer, and the
student learns to predict so without it (self-distillation, arXiv 2601.19897 and 2601.18734).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dominie.core.errors import InputError
from dominie.data.assistant_spans import ends_of_turn
from dominie.data.batch import Batch, Padding, Row, Span, filled
from dominie.data.chat_template import ChatTemplate
from dominie.data.row_store import Row as Tokenised
from dominie.losses.targets import Signal
from dominie.teachers.teacher import LocalTeacher

#: Questions whose ends have nothing in common.
_QUESTIONS = ("How many?", "Name it", "7")


@dataclasses.dataclass(frozen=True)
class AnswerPrompt:
    """Writes right answers into the prompts of a conversation, in tokens.

    Attributes:
        ending: the tokens that end a question, before which an answer is written.
        before: tokens in front of the answer.
        after: tokens behind it.
        unsaid: tokens that end answers, and are not shown.
    """

    ending: tuple[int, ...]
    before: tuple[int, ...]
    after: tuple[int, ...]
    unsaid: frozenset[int] = frozenset()

    @classmethod
    def of(cls, tokenizer: Any, text: str, *, where: str = "") -> AnswerPrompt:
        """Find these tokens.

        Args:
            tokenizer: with a chat template.
            text: what is added to a question; `{answer}` stands for the answer.
            where: what an error names as its place.

        Raises:
            InputError: the template does not tell where a question ends.
        """
        template, rendered = ChatTemplate(tokenizer), []
        for question in _QUESTIONS:
            chat = [{"role": "user", "content": question}]
            written = template.text(chat, None, where=where, generation_prompt=True)
            rendered.append(tokenizer(written, add_special_tokens=False)["input_ids"])
        same = 0  # so many last tokens have all three
        while len({tuple(ids[-same - 1 :]) for ids in rendered}) == 1:
            same += 1
        ending = rendered[0][len(rendered[0]) - same :]
        if not ending:
            raise InputError(
                "the chat template has nothing between a question and its answer, so that the "
                "right answer cannot be written there",
                where=where or None,
                do="use a chat template that ends a question, or name a teacher without shows",
            )
        before, after = (
            tuple(tokenizer(part, add_special_tokens=False)["input_ids"]) if part else ()
            for part in text.split("{answer}")
        )
        # A token of its own ends questions wherever they stand; other text may differ further on.
        ending = ending[:1] if ending[0] in tokenizer.added_tokens_decoder else ending
        unsaid = {*tokenizer.all_special_ids, *ends_of_turn(tokenizer)}
        return cls(tuple(ending), before, after, frozenset(unsaid))

    def row(self, span: Span) -> Row:
        """The conversation with the right answer in front of each answer that is learnt from.

        Its supervised tokens are those of the conversation, in the same order.

        Raises:
            ValueError: no question ends before an answer.
        """
        ids, flags = span.input_ids, np.append(False, span.taught[:-1])
        parts: list[tuple[Any, Any]] = []
        at = done = 0
        bounds = np.flatnonzero(np.diff(flags, prepend=False, append=False))
        for begin, end in bounds.reshape(-1, 2).tolist():
            shown = self.shown(ids[begin:end] if span.shown is None else span.shown)
            place = done + self._place(ids[done:begin])
            parts += [(ids[at:place], flags[at:place]), (shown, np.zeros(len(shown), np.bool_))]
            at, done = place, end
        parts.append((ids[at:], flags[at:]))
        whole, supervised = (np.concatenate(each) for each in zip(*parts, strict=True))
        return Tokenised(whole.astype(np.int32), supervised)

    def shown(self, answer: Sequence[int] | NDArray[Any]) -> list[int]:
        """What is added to a question: the answer without the tokens that end it, and the text."""
        said = [int(token) for token in answer]
        while said and said[-1] in self.unsaid:
            said.pop()
        return [*self.before, *said, *self.after]

    def _place(self, ids: NDArray[Any]) -> int:
        """Where the last question in `ids` ends."""
        size = len(self.ending)
        for place in range(len(ids) - size, -1, -1):
            if tuple(ids[place : place + size].tolist()) == self.ending:
                return place
        raise ValueError(
            f"no question ends before the answer that its teacher is to read: none of the tokens "
            f"{list(self.ending)} stands there"
        )


class AnswerReadingTeacher:
    """A local teacher that reads the right answer of every conversation in its prompt.

    Its predictions are those at the supervised positions, as many as the student's and in the same
    order, whatever stands between them.

    Args:
        teacher: the model, which may teach other sources without it.
        prompt: writes the answers.
    """

    def __init__(self, teacher: LocalTeacher, prompt: AnswerPrompt) -> None:
        self.teacher, self.prompt = teacher, prompt
        self.needs_all_ranks = teacher.needs_all_ranks

    def signal(self, batch: Batch) -> Signal:
        """Hidden states [n, D_t] of the supervised positions, and the head.

        Raises:
            ValueError: a conversation without a question.
        """
        rows: list[list[tuple[int, Row]]] = [[] for _ in batch.input_ids]
        for span in batch.spans:
            rows[span.row].append((span.source, self.prompt.row(span)))
        device = batch.input_ids.device
        read = filled(rows, Padding.on(device, None)).to(device)
        parts = self.teacher.signal(read).parts
        return Signal(tuple(dataclasses.replace(part, attention={}) for part in parts))

    def run_for_other_ranks(self, device: torch.device) -> None:
        """Run the forward pass for other ranks (`LocalTeacher`)."""
        self.teacher.run_for_other_ranks(device)
