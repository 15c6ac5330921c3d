"""Time and memory of attention distillation, beside logits alone and beside attention maps.

Three questions, three tables:

* step: a whole training step of a small Mistral under a like teacher. How much does the attention
  term add to distillation on logits alone, and what do maps cost (both models' maps kept and
  compared, as the paper's code does)?
* layer: loss and gradient of one layer. On a GPU it has the paper's geometry, and `floor` is the
  time of six causal score products at the measured speed of a large matrix product (four where the
  student's own log-sum-exps could be had from its forward).
* error: how far the gradients of bf16 inputs are from float64, as student nears teacher.

The methods take turns, so that a busy machine is busy for all; a ratio is the median of the ratios
of the rounds, of wall time and, on a CPU, also of the process's CPU time, which others' load on the
machine disturbs less. Peak memory is above what was allocated before the step.

    python benchmarks/attention.py [--quick] [--json] [--seconds 60]

``--quick`` ends within 50 seconds on two cores; a full run also writes a dated table to
``benchmarks/results``. After ``--seconds`` no further round is begun.
"""

from __future__ import annotations

import statistics
import sys
import time
from typing import TYPE_CHECKING

import _attention_errors
import _results
import torch
from _memory import peak_above, settled
from _results import DEVICE, GPU, Deadline, Row
from _speed import matrix_speed
from torch.nn.functional import kl_div

from dominie.losses import attention_divergence, prediction_divergence
from dominie.models.attention_capture import AttentionTarget, StudentAttention, TeacherAttention

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor, nn

DTYPE = torch.bfloat16 if GPU else torch.float32
BACKENDS = ["triton", "sdpa"] if GPU else ["tiles", "sdpa"]


class Step:
    """A student, a teacher, and the steps that can be taken with them."""

    def __init__(self, length: int) -> None:
        from transformers import AutoModelForCausalLM, MistralConfig

        sizes = (4096, 14336, 8, 32, 8, 32000) if GPU else (256, 896, 8, 8, 2, 8000)
        names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        names += ("num_key_value_heads", "vocab_size")
        options = dict(zip(names, sizes, strict=True))
        config = MistralConfig(
            **options, max_position_embeddings=length, sliding_window=None, initializer_range=0.05
        )
        torch.manual_seed(0)
        with DEVICE:
            models = [
                AutoModelForCausalLM.from_config(config, dtype=DTYPE, attn_implementation="sdpa")
                for _ in range(2)
            ]
        self.student, self.teacher = models[0].train(), models[1].requires_grad_(False).eval()
        if GPU:
            self.student.gradient_checkpointing_enable({"use_reentrant": False})
        self.layers = range(config.num_hidden_layers)
        self.ids = torch.randint(config.vocab_size, (1 if GPU else 2, length), device=DEVICE)
        self.weights = torch.ones(self.ids.shape, device=DEVICE)

    def logits(self) -> Tensor:
        """Distillation on logits alone."""
        with torch.no_grad():
            taught = self._hidden(self.teacher)
        return self._prediction(self._hidden(self.student), taught)

    def attention(self, backend: str, *, value: bool) -> Tensor:
        """The attention term added, as dominie does."""
        kept = TeacherAttention(self.teacher, self.layers)
        scored = StudentAttention(self.student, [(n, n) for n in self.layers], backend=backend)
        with torch.no_grad():
            taught = self._hidden(self.teacher)
        rows = torch.arange(len(self.ids))
        target = AttentionTarget(rows, self.weights, kept.take())
        scored.expect([target], segment_ids=None, value=value)
        hidden = self._hidden(self.student)
        loss = self._prediction(hidden, taught) + scored.take()
        scored.detach()
        kept.detach()
        return loss

    def maps(self) -> Tensor:
        """The attention term from the maps of both models, step for step as the paper's code."""
        for model in (self.student, self.teacher):
            model.set_attn_implementation("eager")
        options = {"input_ids": self.ids, "use_cache": False, "output_attentions": True}
        with torch.no_grad():
            taught = self.teacher.model(**options)
        learned = self.student.model(**options)
        loss = self._prediction(learned.last_hidden_state, taught.last_hidden_state)
        length = self.ids.shape[1]
        seen = torch.ones(len(self.ids), 1, length, length, device=DEVICE).tril()
        for own, other in zip(learned.attentions, taught.attentions, strict=True):
            logarithms = own.masked_fill(seen == 0, 1e-9).log()
            divergence = kl_div(logarithms, other * seen, reduction="none").sum()
            loss = loss + divergence / (own.shape[1] * len(self.layers))
        for model in (self.student, self.teacher):
            model.set_attn_implementation("sdpa")
        return loss

    def _hidden(self, model: nn.Module) -> Tensor:
        return model.model(input_ids=self.ids, use_cache=False).last_hidden_state

    def _prediction(self, hidden: Tensor, taught: Tensor) -> Tensor:
        return prediction_divergence(
            hidden.flatten(0, 1),
            self.student.lm_head.weight,
            taught.flatten(0, 1),
            self.teacher.lm_head.weight,
        )


def step_rows(length: int, rounds: int, *, maps: bool, deadline: Deadline) -> list[Row]:
    """Whole steps: forward of both models, loss, backward."""
    step = Step(length)
    methods: dict[str, Callable[[], Tensor]] = {"logits": step.logits}
    for backend in BACKENDS:
        methods[backend] = lambda backend=backend: step.attention(backend, value=False)
    methods["with value"] = lambda: step.attention(BACKENDS[0], value=True)
    if maps:
        methods["maps"] = step.maps

    def backward(loss: Callable[[], Tensor]) -> float:
        step.student.zero_grad(set_to_none=False)
        value = loss()
        value.backward()
        return value.item()

    times, peaks, values = taken_in_turns(methods, backward, rounds, deadline)
    busy = {name: [cpu for _, cpu in times[name]] for name in methods}
    wall = {name: [seconds for seconds, _ in times[name]] for name in methods}
    if maps and abs(values["with value"] - values["maps"]) > 2e-2 * abs(values["maps"]):
        raise SystemExit(f"the losses differ: {values}")
    return [
        {
            "part": "step",
            "length": length,
            "method": name,
            "seconds": round(statistics.median(wall[name]), 4),
            "to_logits": _ratio(wall[name], wall["logits"]),
            "maps_to_it": _ratio(wall["maps"], wall[name]) if maps else None,
            "cpu_to_logits": None if GPU else _ratio(busy[name], busy["logits"]),
            "cpu_maps_to_it": _ratio(busy["maps"], busy[name]) if maps and not GPU else None,
            "peak_gb": _gigabytes(peaks[name]),
            "device": DEVICE.type,
        }
        for name in methods
    ]


def taken_in_turns(
    methods: dict[str, Callable[[], Tensor]],
    run: Callable[[Callable[[], Tensor]], float],
    rounds: int,
    deadline: Deadline,
) -> tuple[dict[str, list[tuple[float, float]]], dict[str, float | None], dict[str, float]]:
    """(Seconds, CPU seconds) of every round, peak bytes, value; a round of several warms up."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in methods}
    peaks: dict[str, float | None] = {}
    values: dict[str, float] = {}
    warming = int(rounds > 1)
    for turn in range(rounds + warming):
        if turn > warming and deadline.passed:
            break
        for name, method in methods.items():
            slow = name == "maps" and not GPU  # minutes: not warmed up, and once is enough
            if slow and turn:
                continue
            before = settled()
            start = time.perf_counter(), time.process_time()
            values[name] = run(method)
            if GPU:
                torch.cuda.synchronize()
            elapsed = time.perf_counter() - start[0], time.process_time() - start[1]
            peaks[name] = peak_above(before)
            if turn >= warming or slow:
                times[name].append(elapsed)
    return times, peaks, values


def projections(length: int, *, batch: int, heads: int, key_heads: int, width: int) -> Row:
    """Arguments of one layer's loss; every row weighted."""
    generator = torch.Generator(DEVICE).manual_seed(0)

    def drawn(count: int) -> Tensor:
        shape = (batch, length, count, width)
        tensor = torch.randn(shape, generator=generator, device=DEVICE, dtype=DTYPE)
        return tensor.transpose(1, 2)  # as models lay it out

    return {
        "student_query": drawn(heads).requires_grad_(),
        "student_key": drawn(key_heads).requires_grad_(),
        "teacher_query": drawn(heads),
        "teacher_key": drawn(key_heads),
        "row_weights": torch.ones(batch, length, device=DEVICE),
        "student_scale": width**-0.5,
        "teacher_scale": width**-0.5,
    }


def layer_rows(length: int, rounds: int, *, maps: bool, deadline: Deadline) -> list[Row]:
    """Loss and gradient of one layer, the value not computed."""
    sizes = {"batch": 1, "heads": 32, "key_heads": 8, "width": 128}
    if not GPU:
        sizes = {"batch": 2, "heads": 8, "key_heads": 2, "width": 32}
    arguments = projections(length, **sizes)
    names = [*BACKENDS, *(["eager"] if maps else [])]
    inputs = [arguments["student_query"], arguments["student_key"]]
    methods = {
        name: lambda name=name: attention_divergence(**arguments, value=False, backend=name)
        for name in names
    }

    def backward(loss: Callable[[], Tensor]) -> float:
        value = loss()
        torch.autograd.grad(value, inputs)
        return value.item()

    times, peaks, _ = taken_in_turns(methods, backward, rounds, deadline)
    product = sizes["batch"] * sizes["heads"] * sizes["width"] * length**2  # operations, causal
    floor = 6 * product / matrix_speed() if GPU else None
    rows = []
    for name in names:
        seconds = statistics.median(wall for wall, _ in times[name])
        rows.append(
            {
                "part": "layer",
                "length": length,
                "method": "maps" if name == "eager" else name,
                "milliseconds": round(1000 * seconds, 3),
                "cpu_milliseconds": None
                if GPU
                else round(1000 * statistics.median(cpu for _, cpu in times[name]), 1),
                "over_floor_6u": round(seconds / floor, 2) if floor else None,
                "over_floor_4u": round(seconds / floor * 1.5, 2) if floor else None,
                "peak_gb": _gigabytes(peaks[name]),
                "device": DEVICE.type,
            }
        )
    return rows


def _ratio(own: list[float], other: list[float]) -> float:
    """Median of the ratios of the rounds; of the medians where one took part in fewer."""
    if len(own) != len(other):
        return round(statistics.median(own) / statistics.median(other), 3)
    return round(statistics.median(a / b for a, b in zip(own, other, strict=True)), 3)


def _gigabytes(count: float | None) -> float | None:
    return None if count is None else round(count / 1e9, 3)


def measured(quick: bool, deadline: Deadline) -> Iterator[list[Row]]:
    """The tables' rows, short sequences first."""
    if quick:
        yield step_rows(512, 1, maps=True, deadline=deadline)
        yield layer_rows(512, 2, maps=True, deadline=deadline)
        yield list(_attention_errors.rows(32))
        return
    yield list(_attention_errors.rows(128))
    for length in (2048, 4096, 8192) if GPU else (1024, 2048, 4096, 8192):
        if deadline.passed:
            print(f"out of time: no rows of {length}", file=sys.stderr)
            continue
        rounds, with_maps = (20, 4096) if GPU else (3, 2048)
        yield layer_rows(length, rounds, maps=length <= with_maps, deadline=deadline)
        rounds = 10 if GPU else 2 if length < 4096 else 1
        yield step_rows(length, rounds, maps=length <= 2048, deadline=deadline)


def main() -> None:
    options = _results.parser(__doc__, timed=True).parse_args()
    deadline = Deadline(options.seconds)
    rows = (row for group in measured(options.quick, deadline) for row in group)
    parts = _results.gathered(rows, as_json=options.json)
    _results.finish("attention", "Attention distillation", parts, options)


if __name__ == "__main__":
    main()
