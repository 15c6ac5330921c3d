"""Packed rows: how many of their positions hold a token, and what attention over them costs.

* layout: lengths are drawn log-normal and cut at the longest row, 2,048 tokens. Each setting is
  laid out over a whole optimiser step, as training does it, and beside that within each micro-batch
  alone; with one teacher, and with a second one that has a tenth of the conversations and shares no
  row. Real tokens of all positions; CPU time for laying a step out.
* attention: a forward and backward pass of a small Mistral over rows of conversations of about 300
  tokens: by conversation, as training runs it; under the dense mask that transformers derives from
  the positions; and over rows of one conversation as long, which have more to attend to. The
  methods take turns; ratios are medians of the rounds, also of the process's CPU time. Peak memory
  is above what was allocated before the pass.

    python benchmarks/packing.py [--quick] [--json] [--seconds 60]

``--quick`` draws fewer steps and measures shorter rows; a full run also writes a dated table to
``benchmarks/results``. After ``--seconds`` no further round is begun.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import _results
import numpy as np
import torch
from _memory import prepare
from _results import DEVICE, GPU, Deadline, Row
from _turns import median, notes, ratio, taken_in_turns

from dominie.data.batch import Padding, filled
from dominie.data.layout import Layout, layout
from dominie.data.tokenization import Encoded
from dominie.models.packed_attention import decoder_inputs, use_stock_attention

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from dominie.data.batch import Batch

ROW = 2048
#: Median tokens of a conversation and the deviation of their logarithm.
LENGTHS = [(200, 0.8), (300, 1.0), (500, 0.7), (1000, 0.6)]
#: Conversations of an optimiser step and of a micro-batch.
BATCHES = [(256, 8), (256, 32), (64, 8), (64, 32)]

Lay = Callable[[list[int], list[int], int], list[Layout]]


def over_the_step(lengths: list[int], routes: list[int], micro_batch: int) -> list[Layout]:
    """Rows and micro-batches of all conversations together."""
    count = len(lengths) // micro_batch
    return [layout(lengths, routes, micro_batches=count, capacity=ROW)]


def by_length(lengths: list[int], routes: list[int], micro_batch: int) -> list[Layout]:
    """One conversation to a row, those of about one length together."""
    return [layout(lengths, routes, micro_batches=len(lengths) // micro_batch)]


def in_each_micro_batch(lengths: list[int], routes: list[int], micro_batch: int) -> list[Layout]:
    """Rows of what happens to come together."""
    found = []
    for start in range(0, len(lengths), micro_batch):
        part = slice(start, start + micro_batch)
        (laid,) = layout(lengths[part], routes[part], capacity=ROW)
        found.append([[[start + i for i in row] for row in laid]])
    return found


def in_order(lengths: list[int], _: list[int], micro_batch: int) -> list[Layout]:
    """One conversation to a row, padded to the longest that happens to be beside it."""
    starts = range(0, len(lengths), micro_batch)
    return [[[[i] for i in range(start, start + micro_batch)]] for start in starts]


def positions(found: Sequence[Layout], lengths: Sequence[int]) -> int:
    """Of all micro-batches, padding and all."""
    micro_batches = itertools.chain.from_iterable(found)
    return sum(len(m) * max(sum(lengths[i] for i in row) for row in m) for m in micro_batches)


def real_tokens(steps: Sequence[tuple[list[int], list[int]]], micro_batch: int, lay: Lay) -> str:
    """Tokens of all positions, in percent."""
    taken = sum(positions(lay(*step, micro_batch), step[0]) for step in steps)
    return f"{100 * sum(sum(lengths) for lengths, _ in steps) / taken:.1f} %"


def drawn(
    median: int, deviation: float, batch: int, count: int, *, domain: float
) -> list[tuple[list[int], list[int]]]:
    """Lengths and routes of so many steps."""
    random = np.random.default_rng(0)
    steps = []
    for _ in range(count):
        lengths = random.lognormal(np.log(median), deviation, batch).astype(int).clip(8, ROW)
        routes = random.permutation(np.arange(batch) < round(domain * batch)).astype(int)
        steps.append((lengths.tolist(), routes.tolist()))
    return steps


class Pass:
    """A model, and forward passes of it over rows of so many positions."""

    def __init__(self, length: int) -> None:
        from transformers import AutoModelForCausalLM, MistralConfig

        sizes = (4096, 14336, 4, 32, 8, 32000) if GPU else (256, 896, 4, 8, 2, 8000)
        names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        names += ("num_key_value_heads", "vocab_size")
        options = dict(zip(names, sizes, strict=True))
        config = MistralConfig(**options, max_position_embeddings=length, sliding_window=None)
        torch.manual_seed(0)
        with DEVICE:
            self.model = AutoModelForCausalLM.from_config(
                config, dtype=torch.bfloat16 if GPU else torch.float32, attn_implementation="sdpa"
            )
        random = np.random.default_rng(0)
        padding = Padding.on(DEVICE, length)

        def batch(*lengths: int) -> Batch:
            row = [(0, Encoded(random.integers(0, 8000, n).tolist(), [True] * n)) for n in lengths]
            return filled([row] * (4 if GPU else 2), padding).to(DEVICE)

        drawn: list[int] = []
        while sum(drawn) < length - 64:
            drawn.append(int(np.clip(random.lognormal(np.log(300), 0.6), 16, length - sum(drawn))))
        drawn += [rest] if (rest := length - sum(drawn)) else []
        self.conversations, self.packed, self.full = len(drawn), batch(*drawn), batch(length)

    def by_conversation(self) -> Tensor:
        """Packed rows as training runs them."""
        return self._loss(decoder_inputs(self.model, self.packed))

    def under_a_mask(self) -> Tensor:
        """Packed rows under the mask of [B, 1, L, L]."""
        use_stock_attention(self.model)
        return self._loss(self.packed.model_inputs())

    def one_to_a_row(self) -> Tensor:
        """As many tokens, one conversation to a row."""
        use_stock_attention(self.model)
        return self._loss(self.full.model_inputs())

    def _loss(self, inputs: dict[str, object]) -> Tensor:
        self.model.zero_grad(set_to_none=False)
        loss: Tensor = self.model.model(**inputs).last_hidden_state.square().mean()
        loss.backward()
        return loss.detach()


def attention_rows(length: int, rounds: int, deadline: Deadline) -> list[Row]:
    """Forward and backward passes over packed rows and full ones."""
    taken = Pass(length)
    methods = {
        "by conversation": taken.by_conversation,
        "dense mask": taken.under_a_mask,
        "one to a row": taken.one_to_a_row,
    }
    turns = taken_in_turns(methods, rounds, deadline)
    wall, cpu, ours = turns.wall, turns.cpu, "by conversation"
    rows = [
        {
            "part": "attention",
            "length": length,
            "conversations to a row": taken.conversations,
            "method": name,
            "seconds": median(wall[name], 4),
            "to by conversation": ratio(wall[name], wall[ours]),
            "cpu to by conversation": None if GPU else ratio(cpu[name], cpu[ours]),
            "peak_gb": None if (peak := turns.peaks.get(name)) is None else round(peak / 1e9, 2),
            "device": DEVICE.type,
            **notes(turns, name),
        }
        for name in methods
    ]
    both = [turns.values.get(name) for name in (ours, "dense mask")]
    if None not in both and abs(both[0] - both[1]) > (1e-2 if GPU else 1e-4) * abs(both[1]):
        rows[0]["wrong"] = f"its value is {both[0]:.6g}, under a mask {both[1]:.6g}"
    return rows


def rows(quick: bool, seconds: float | None) -> Iterator[Row]:
    """Of attention one for each length and method; one for each distribution and batch."""
    deadline = Deadline(seconds)
    for length in (512, 1024) if quick else (512, 1024, 2048, 4096):
        if not deadline.passed:
            yield from attention_rows(length, 2 if quick else 5, deadline)
    yield from layout_rows(quick)


def layout_rows(quick: bool) -> Iterator[Row]:
    """One row for each distribution and batch."""
    for (middle, deviation), (batch, micro_batch) in itertools.product(LENGTHS, BATCHES):
        count = 5 if quick else 50
        one = drawn(middle, deviation, batch, count, domain=0.0)
        two = drawn(middle, deviation, batch, count, domain=0.1)
        started = time.process_time()
        packed = real_tokens(one, micro_batch, over_the_step)
        milliseconds = 1000 * (time.process_time() - started) / count
        yield {
            "part": "layout",
            "median (deviation)": f"{middle} ({deviation})",
            "batch": batch,
            "micro_batch": micro_batch,
            "packed over the step": packed,
            "within micro-batches": real_tokens(one, micro_batch, in_each_micro_batch),
            "two teachers, step": real_tokens(two, micro_batch, over_the_step),
            "two teachers, micro-batches": real_tokens(two, micro_batch, in_each_micro_batch),
            "not packed, by length": real_tokens(one, micro_batch, by_length),
            "not packed, in order": real_tokens(one, micro_batch, in_order),
            "ms a step": f"{milliseconds:.1f}",
        }


def main() -> None:
    """Measure, print, and after a full run write down."""
    options = _results.parser(__doc__, timed=True).parse_args()
    prepare()
    parts = _results.gathered(rows(options.quick, options.seconds), as_json=options.json)
    note = "layout: real tokens of all positions; CPU time for laying a step out."
    _results.finish("packing", "Packed rows", parts, options, note=note)


if __name__ == "__main__":
    main()
