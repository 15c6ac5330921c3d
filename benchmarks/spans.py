"""Teachers with another tokenizer: what a step and the map between two vocabularies cost.

* step: the teacher's targets, the student's losses and their backward pass, over texts of made-up
  words: of ten words seven are one token on both sides, two are two tokens of the teacher and one
  is two of the student. Beside it the same step with a teacher of the student's tokenizer
  (`prediction`). Both take turns; `ratio` is the median of the rounds' ratios of processor time.
* map: seconds for the map from a teacher's 262,144 tokens to a student's 49,152, both made up.

    python benchmarks/spans.py [--quick] [--json] [--seconds 120]

``--quick`` has small vocabularies; a full run also writes a dated table to ``benchmarks/results``.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import _results
import numpy as np
import torch
from _memory import prepare
from _results import DEVICE, GPU, Deadline, Row
from _turns import median, notes, ratio, taken_in_turns

from dominie.data.batch import Batch, collate
from dominie.data.paired_text import GAP, Paired
from dominie.data.row_store import Row as Tokens
from dominie.data.token_bytes import END, TokenBytes, Vocabularies, vocabulary_map
from dominie.losses.forward_pass import ForwardPass
from dominie.losses.objective import Objective
from dominie.losses.terms import LossTerms, Prediction, Spans
from dominie.models.head import output_head
from dominie.teachers.span_teacher import SpanTeacher
from dominie.teachers.teacher import LocalTeacher

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

_WORDS = 2000
_PROMPT = 8


def made_up(count: int, random: np.random.Generator) -> list[bytes]:
    """Different words of 4 to 9 letters, with a space before each."""
    found: dict[bytes, None] = {}
    while len(found) < count:
        letters = random.integers(97, 123, random.integers(4, 10)).astype(np.uint8)
        found[b" " + letters.tobytes()] = None
    return list(found)


def vocabulary(words: list[bytes], split: range, size: int, random: Any) -> TokenBytes:
    """Tokens for the words, those at `split` (of ten) in halves, and others up to a size."""
    tokens: dict[bytes | None, None] = {None: None, END: None}
    for number, word in enumerate(words):
        parts = (word[:3], word[3:]) if number % 10 in split else (word,)
        tokens |= dict.fromkeys(parts)
    while len(tokens) < size:
        tokens |= dict.fromkeys(made_up(min(4096, size - len(tokens)), random))
    return TokenBytes(list(tokens)[:size])


class World:
    """Texts in the tokens of two vocabularies, and models for both."""

    def __init__(self, student: int, teacher: int, rows: int, length: int) -> None:
        random = np.random.default_rng(0)
        words = made_up(_WORDS, random)
        ours = vocabulary(words, range(9, 10), student, random)
        theirs = vocabulary(words, range(7, 9), teacher, random)
        started = time.process_time()
        self.words = Vocabularies(ours, theirs, vocabulary_map(theirs, ours))
        self.map_seconds = time.process_time() - started
        self.pairs: dict[bytes, Paired] = {}
        made = []
        for _ in range(rows):
            text = [words[i] for i in random.integers(0, _WORDS, length)]
            row, pair = self._row(text)
            made.append(row)
            self.pairs[row.input_ids.tobytes()] = pair
        self.batch: Batch = collate([(0, row) for row in made]).to(DEVICE)

    def _row(self, text: list[bytes]) -> tuple[Tokens, Paired]:
        sides = []
        for table in (self.words.student, self.words.teacher):
            ids, ends, at = [0] * _PROMPT, [-1] * (_PROMPT - 1) + [0], 0
            for word in text:
                whole = table.ids.get(word)
                parts = [word] if whole is not None else [word[:3], word[3:]]
                for part in parts:
                    at += len(part)
                    ids.append(table.ids[part])
                    ends.append(at)
            sides.append((np.array([*ids, 1], np.int32), np.array([*ends, at + 1], np.int32)))
        (ids, ends), (theirs, their_ends) = sides
        pair = Paired(b"".join(text) + END + GAP, ends, theirs, their_ends)
        return Tokens(ids, np.arange(len(ids)) >= _PROMPT), pair

    def model(self, size: int, width: int, layers: int, seed: int) -> Any:
        """A Llama with so many tokens."""
        from transformers import AutoModelForCausalLM, LlamaConfig

        config = LlamaConfig(
            vocab_size=size,
            hidden_size=width,
            intermediate_size=3 * width,
            num_hidden_layers=layers,
            num_attention_heads=width // 32,
            num_key_value_heads=width // 32,
        )
        torch.manual_seed(seed)
        with DEVICE:
            dtype = torch.bfloat16 if GPU else torch.float32
            return AutoModelForCausalLM.from_config(config, dtype=dtype)


def step(student: Any, teacher: Any, batch: Batch, terms: LossTerms) -> Tensor:
    """The targets, the losses and the backward pass."""
    student.zero_grad()
    signal = teacher.signal(batch)
    hidden = student.get_decoder()(**batch.model_inputs()).last_hidden_state
    forward = ForwardPass(
        hidden=hidden,
        head=output_head(student),
        labels=batch.labels,
        source_ids=batch.source_ids,
        signal=signal,
        metrics=False,
        scored=batch.positions,
        spans=batch.spans,
    )
    loss = Objective([terms])(forward).total / len(batch.positions)
    loss.backward()
    return loss.detach()


def rows(quick: bool, seconds: float | None) -> Iterator[Row]:
    """One row for each teacher."""
    deadline = Deadline(seconds)
    small, large = (4096, 16384) if quick else (49152, 262144)
    width, layers = (64, 2) if quick else (576, 6)
    count, length = (4, 64) if quick else (8, 256)
    for size in (small, large):
        world = World(small, size, count, length)
        student = world.model(small, width, layers, 0)
        alike = world.model(small, width, layers, 1).eval().requires_grad_(False)
        other = world.model(size, width, layers, 2).eval().requires_grad_(False)
        spans = SpanTeacher(
            other, lambda span, w=world: w.pairs[span.input_ids.tobytes()], world.words
        )
        plain = LocalTeacher(alike)
        turns = taken_in_turns(
            {
                "one tokenizer": lambda s=student, t=plain, b=world.batch: step(
                    s, t, b, LossTerms(prediction=Prediction())
                ),
                "another": lambda s=student, t=spans, b=world.batch: step(
                    s, t, b, LossTerms(spans=Spans())
                ),
            },
            2 if quick else 5,
            deadline,
        )
        yield {
            "part": "step",
            "student's tokens": small,
            "teacher's tokens": size,
            "supervised": len(world.batch.positions),
            "one tokenizer (s)": median(turns.cpu["one tokenizer"], 3),
            "another (s)": median(turns.cpu["another"], 3),
            "ratio": ratio(turns.cpu["another"], turns.cpu["one tokenizer"]),
            **notes(turns, "another"),
        }
        if size == large:
            yield {"part": "map", "teacher's tokens": size, "seconds": round(world.map_seconds, 2)}


def main() -> None:
    """Measure, print, and after a full run write down."""
    options = _results.parser(__doc__, timed=True).parse_args()
    prepare()
    parts = _results.gathered(rows(options.quick, options.seconds), as_json=options.json)
    note = "step: processor seconds of targets, losses and backward; map: of the vocabularies' map."
    _results.finish("spans", "Teachers with another tokenizer", parts, options, note=note)


if __name__ == "__main__":
    main()
