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
machine disturbs less. On a GPU wall time is that between two events on it, over several calls. Peak
memory is above what was allocated before the step. A method that fails has a row that says so, and
the others go on.

    python benchmarks/attention.py [--quick] [--json] [--seconds 60] [--rest]

``--quick`` ends within 50 seconds on two cores, and recomputes activations; a full run also writes
a dated table to ``benchmarks/results``. After ``--seconds`` no further round is begun. ``--rest``
is the table of errors alone.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import _attention_errors
import _results
import torch
from _memory import prepare
from _results import DEVICE, GPU, Deadline, Row
from _speed import matrix_speed
from _turns import median, notes, ratio, taken_in_turns
from torch.nn.functional import kl_div

from dominie.losses import attention_divergence, prediction_divergence
from dominie.models.attention_capture import AttentionTarget, StudentAttention, TeacherAttention

if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import Callable, Iterator

    from torch import Tensor, nn

DTYPE = torch.bfloat16 if GPU else torch.float32
BACKENDS = ["triton", "sdpa"] if GPU else ["tiles", "sdpa"]


#: Rows of a step and of a layer by their length; steps have up to 8,192 tokens.
STEP_ROWS = {2048: 2, 4096: 2, 8192: 1} if GPU else {}
LAYER_ROWS = 4 if GPU else 2
#: Minutes on a CPU: not warmed up, and once is enough.
SLOW = () if GPU else ("maps",)


class Step:
    """A student, a teacher, and the steps that can be taken with them, backward included."""

    def __init__(self, length: int, *, rows: int = 2, checkpointing: bool = False) -> None:
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
        if checkpointing:
            self.student.gradient_checkpointing_enable({"use_reentrant": False})
        self.layers = range(config.num_hidden_layers)
        self.ids = torch.randint(config.vocab_size, (rows, length), device=DEVICE)
        self.weights = torch.ones(self.ids.shape, device=DEVICE)

    def logits(self) -> Tensor:
        """Distillation on logits alone."""
        with torch.no_grad():
            taught = self._hidden(self.teacher)
        return self._learned(self._prediction(self._hidden(self.student), taught))

    def attention(self, backend: str, *, value: bool) -> Tensor:
        """The attention term added, as dominie does."""
        kept = TeacherAttention(self.teacher, self.layers)
        scored = StudentAttention(self.student, [(n, n) for n in self.layers], backend=backend)
        try:  # the listeners stay until backward is through: it may run the layers once more
            with torch.no_grad():
                taught = self._hidden(self.teacher)
            target = AttentionTarget(None, self.weights, kept.take())
            scored.expect([target], segment_ids=None, value=value)
            hidden = self._hidden(self.student)
            return self._learned(self._prediction(hidden, taught) + scored.take())
        finally:
            scored.detach()
            kept.detach()

    def maps(self) -> Tensor:
        """The attention term from the maps of both models, step for step as the paper's code."""
        for model in (self.student, self.teacher):
            model.set_attn_implementation("eager")
        options = {"input_ids": self.ids, "use_cache": False, "output_attentions": True}
        try:
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
            return self._learned(loss)
        finally:
            for model in (self.student, self.teacher):
                model.set_attn_implementation("sdpa")

    def _learned(self, loss: Tensor) -> Tensor:
        self.student.zero_grad(set_to_none=False)
        loss.backward()
        return loss.detach()

    def _hidden(self, model: nn.Module) -> Tensor:
        return model.model(input_ids=self.ids, use_cache=False).last_hidden_state

    def _prediction(self, hidden: Tensor, taught: Tensor) -> Tensor:
        return prediction_divergence(
            hidden.flatten(0, 1),
            self.student.lm_head.weight,
            taught.flatten(0, 1),
            self.teacher.lm_head.weight,
        )


def step_rows(
    length: int, rounds: int, *, maps: bool, deadline: Deadline, checkpointing: bool = False
) -> list[Row]:
    """Whole steps: forward of both models, loss, backward."""
    step = Step(length, rows=STEP_ROWS.get(length, 2), checkpointing=checkpointing)
    methods: dict[str, Callable[[], Tensor]] = {"logits": step.logits}
    for backend in BACKENDS:
        methods[backend] = lambda backend=backend: step.attention(backend, value=False)
    methods["with value"] = lambda: step.attention(BACKENDS[0], value=True)
    if maps:
        methods["maps"] = step.maps
    turns = taken_in_turns(methods, rounds, deadline, calls=2, once=SLOW)
    wall, cpu, values = turns.wall, turns.cpu, turns.values
    rows = [
        {
            "part": "step",
            "length": length,
            "method": name,
            "seconds": median(wall[name], 4),
            "to_logits": ratio(wall[name], wall["logits"]),
            "maps_to_it": ratio(wall["maps"], wall[name]) if maps else None,
            "cpu_to_logits": None if GPU else ratio(cpu[name], cpu["logits"]),
            "cpu_maps_to_it": ratio(cpu["maps"], cpu[name]) if maps and not GPU else None,
            "peak_gb": _gigabytes(turns.peaks.get(name)),
            "device": DEVICE.type,
            **notes(turns, name),
        }
        for name in methods
    ]
    both = [values.get(name) for name in ("with value", "maps")]
    if None not in both and abs(both[0] - both[1]) > 2e-2 * abs(both[1]):
        rows[-1]["wrong"] = f"its loss is {both[1]:.4g}, dominie's {both[0]:.4g}"
    return rows


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
    sizes = {"batch": LAYER_ROWS, "heads": 32, "key_heads": 8, "width": 128}
    if not GPU:
        sizes |= {"heads": 8, "key_heads": 2, "width": 32}
    arguments = projections(length, **sizes)
    inputs = [arguments["student_query"], arguments["student_key"]]

    def differentiated(backend: str) -> Tensor:
        value = attention_divergence(**arguments, value=False, backend=backend)
        torch.autograd.grad(value, inputs)
        return value.detach()

    methods = {name: lambda name=name: differentiated(name) for name in BACKENDS}
    if maps:
        methods["maps"] = lambda: differentiated("eager")
    turns = taken_in_turns(methods, rounds, deadline, calls=10, once=SLOW)
    product = sizes["batch"] * sizes["heads"] * sizes["width"] * length**2  # operations, causal
    floor = 6 * product / matrix_speed() if GPU else None
    rows = []
    for name in methods:
        seconds = median(turns.wall[name], 9)
        over = seconds / floor if seconds and floor else None
        cpu = None if GPU else median(turns.cpu[name], 9)
        rows.append(
            {
                "part": "layer",
                "length": length,
                "method": name,
                "milliseconds": seconds and round(1000 * seconds, 3),
                "cpu_milliseconds": cpu and round(1000 * cpu, 1),
                "over_floor_6u": over and round(over, 2),
                "over_floor_4u": over and round(over * 1.5, 2),
                "peak_gb": _gigabytes(turns.peaks.get(name)),
                "device": DEVICE.type,
                **notes(turns, name),
            }
        )
    return rows


def _gigabytes(count: float | None) -> float | None:
    return None if count is None else round(count / 1e9, 3)


def measured(options: Namespace, deadline: Deadline) -> Iterator[list[Row]]:
    """The tables' rows: steps, then layers, short sequences first, then errors."""
    quick, lengths = options.quick, (2048, 4096, 8192) if GPU else (1024, 2048, 4096, 8192)
    if not options.rest:
        for length in (512,) if quick else lengths:
            if deadline.passed:
                print(f"out of time: no steps of {length}", file=sys.stderr)
                continue
            rounds = 1 if quick else 5 if GPU else 2 if length < 4096 else 1
            maps = length <= 2048
            yield step_rows(length, rounds, maps=maps, deadline=deadline, checkpointing=quick)
        for length in (512,) if quick else lengths:
            if deadline.passed:
                print(f"out of time: no layers of {length}", file=sys.stderr)
                continue
            rounds = 2 if quick else 3
            yield layer_rows(length, rounds, maps=length <= 2048, deadline=deadline)
    if deadline.passed:
        print("out of time: no errors", file=sys.stderr)
    else:
        yield list(_attention_errors.rows(32 if quick else 128))


def main() -> None:
    options = _results.parser(__doc__, timed=True, rest=True).parse_args()
    prepare()
    deadline = Deadline(options.seconds)
    rows = (row for group in measured(options, deadline) for row in group)
    parts = _results.gathered(rows, as_json=options.json)
    _results.finish("attention", "Attention distillation", parts, options)


if __name__ == "__main__":
    main()
