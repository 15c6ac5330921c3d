"""Time and memory of the prediction loss, beside materialised logits, TRL and Liger.

Forward and backward of the forward KL between two heads, on the same inputs in the same run. The
methods take turns, so that a busy machine is busy for all of them; a ratio is the median of the
ratios of the rounds. Peak memory is above the inputs and their gradients, and is taken by a
process of its own for each method (on a GPU by the allocator's own count). Seconds on a GPU lie
between two events on it, ten calls apart. A method that fails has a row that says so, and the
others go on.

    python benchmarks/prediction.py [--quick] [--json] [--seconds 45] [--rest]

``--quick`` ends within 50 seconds on two cores; a full run also writes a dated table to
``benchmarks/results``. After ``--seconds`` no further case is begun. TRL and Liger are measured
where they are installed. On a GPU the first two cases matter most; ``--rest`` is all but these.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import statistics
import subprocess
import sys
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import _results
import torch
from _memory import peak_above, prepare, settled
from _results import DEVICE, GPU, Deadline
from _speed import timed
from _turns import median, notes, ratio, taken_in_turns
from torch.nn.functional import kl_div, linear

from dominie.losses import prediction_divergence, vocabulary_losses

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

MEBIBYTE = 2**20


@dataclass(frozen=True)
class Case:
    """Sizes, and how often to measure; ``materialised`` where all logits fit in memory."""

    tokens: int
    vocabulary: int
    width: int
    rounds: int
    materialised: bool = True
    peers: bool = True

    def inputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Student hidden and head, teacher hidden and head: logits of about unit variance."""
        torch.manual_seed(0)
        dtype = torch.bfloat16 if GPU else torch.float32
        tensors = []
        for rows in (self.tokens, self.vocabulary) * 2:
            deviation = 1 if rows == self.tokens else self.width**-0.5
            empty = torch.empty(rows, self.width, dtype=dtype, device=DEVICE)
            tensors.append(empty.normal_(0, deviation))
        for student in tensors[:2]:
            student.requires_grad_()
        return tuple(tensors)


def materialised(hidden: Tensor, head: Tensor, teacher_hidden: Tensor, teacher_head: Tensor):
    student = linear(hidden, head).float().log_softmax(-1)
    with torch.no_grad():
        teacher = linear(teacher_hidden, teacher_head).float().log_softmax(-1)
    return kl_div(student, teacher, reduction="sum", log_target=True)


def dominie_triton(*inputs: Tensor) -> Tensor:
    return prediction_divergence(*inputs, backend="triton")


def dominie_torch(*inputs: Tensor) -> Tensor:
    return prediction_divergence(*inputs, backend="torch")


def trl(hidden: Tensor, head: Tensor, teacher_hidden: Tensor, teacher_head: Tensor) -> Tensor:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    arguments = (hidden, head, None, teacher_hidden, teacher_head, None, 0.0)
    return ChunkedDivergenceFunction.apply(*arguments)[0].sum()


def liger(hidden: Tensor, head: Tensor, teacher_hidden: Tensor, teacher_head: Tensor) -> Tensor:
    from liger_kernel.chunked_loss.jsd_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0, compiled=GPU
    )
    labels = torch.zeros(len(hidden), dtype=torch.int64, device=DEVICE)
    return loss(hidden, head, teacher_hidden, teacher_head, labels) * len(hidden)


def methods(case: Case) -> dict[str, Callable[..., Tensor]]:
    """What can run here; peers where they are installed."""
    found: dict[str, Callable[..., Tensor]] = {}
    if case.materialised:
        found["materialised"] = materialised
    found["dominie"] = dominie_torch
    if GPU:
        found["dominie-triton"] = dominie_triton
    if case.peers and importlib.util.find_spec("trl"):
        found["trl"] = trl
    if case.peers and importlib.util.find_spec("liger_kernel"):
        found["liger"] = liger
    return found


def differentiated(loss: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> Tensor:
    """The loss after its backward pass."""
    for tensor in inputs:
        tensor.grad = None
    value = loss(*inputs)
    value.backward()
    return value.detach()


def peak_mebibytes(case: Case, name: str) -> int | None:
    """Above the inputs and gradients; None where the system does not say, or it does not fit."""
    if GPU:
        try:
            return _peak(case, methods(case)[name])
        except torch.OutOfMemoryError:
            return None
    command = [sys.executable, __file__, "--peak", name, json.dumps(asdict(case))]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(result.stdout)


def _peak(case: Case, loss: Callable[..., Tensor]) -> int | None:
    warm = Case(tokens=2, vocabulary=8, width=4, rounds=1).inputs()
    differentiated(loss, warm)
    inputs = case.inputs()
    gradients = sum(x.numel() * x.element_size() for x in inputs if x.requires_grad)
    before = settled()
    differentiated(loss, inputs)
    peak = peak_above(before)
    return None if peak is None else round((peak - gradients) / MEBIBYTE)


def measured(case: Case, deadline: Deadline) -> Iterator[dict[str, object]]:
    """One row for each method."""
    inputs, losses = case.inputs(), methods(case)
    calls = {name: functools.partial(differentiated, loss, inputs) for name, loss in losses.items()}
    turns = taken_in_turns(calls, case.rounds, deadline, calls=10)
    expected = turns.values.get("dominie")
    del inputs, calls
    for name in losses:
        about, value = notes(turns, name), turns.values.get(name)
        if None not in (value, expected) and abs(value - expected) > 2e-3 * abs(expected):
            about["wrong"] = f"its loss is {value:.6g}, dominie's {expected:.6g}"
        reference = turns.wall["materialised"] if case.materialised else []
        yield {
            "tokens": case.tokens,
            "vocabulary": case.vocabulary,
            "width": case.width,
            "method": name,
            "seconds": median(turns.wall[name], 5),
            "ratio": ratio(turns.wall[name], reference),
            "peak_mb": None if name in turns.failures else peak_mebibytes(case, name),
            "rounds": len(turns.wall[name]),
            "device": DEVICE.type,
            **about,
        }


def measured_step(fraction: float, tokens: int, rounds: int) -> dict[str, object]:
    """A whole training step of a small Llama: all positions projected, or the supervised ones."""
    from transformers import LlamaConfig, LlamaModel

    torch.manual_seed(0)
    vocabulary, width = 32000, 512
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=8,
        num_attention_heads=8,
    )
    model = LlamaModel(config).to(DEVICE)
    head = model.get_input_embeddings().weight
    ids = torch.randint(vocabulary, (1, tokens), device=DEVICE)
    teacher = torch.randn(tokens, width, device=DEVICE), torch.randn_like(head)
    supervised = torch.zeros(tokens, dtype=torch.bool, device=DEVICE)
    supervised[tokens - round(fraction * tokens) :] = True

    def step(rows: Tensor, weights: Tensor | None) -> Tensor:
        model.zero_grad()
        hidden = model(ids).last_hidden_state[0]
        target = (teacher[0][rows], teacher[1])
        loss = vocabulary_losses(hidden[rows], head, target, divergence_weights=weights)
        loss.total.backward()
        return loss.total.detach()

    everything = torch.ones_like(supervised)
    pairs = [
        (
            timed(lambda: step(everything, supervised.float()))[0],
            timed(lambda: step(supervised, None))[0],
        )
        for _ in range(rounds + 1)
    ][1:]
    return {
        "supervised": fraction,
        "tokens": tokens,
        "all_positions_seconds": round(statistics.median(all_ for all_, _ in pairs), 4),
        "supervised_only_seconds": round(statistics.median(own for _, own in pairs), 4),
        "ratio": round(statistics.median(own / all_ for all_, own in pairs), 3),
        "rounds": rounds,
        "device": DEVICE.type,
    }


def cases(quick: bool, *, rest: bool) -> list[Case]:
    """What is measured, the cases that matter most first."""
    if quick:
        return [] if rest else [Case(256, 16000, 128, rounds=2)]
    if GPU:
        most = [Case(8192, 128256, 4096, rounds=3), Case(1024, 128256, 4096, rounds=5)]
        sizes = [(t, v) for v in (32000, 151936, 128256) for t in (1024, 4096, 8192, 16384)]
        others = [
            Case(tokens, vocabulary, 4096, rounds=3, materialised=tokens <= 8192, peers=False)
            for tokens, vocabulary in sizes
        ]
        known = {(case.tokens, case.vocabulary) for case in most}
        return [c for c in others if (c.tokens, c.vocabulary) not in known] if rest else most
    # On a CPU the large cases take minutes: once, and dominie alone.
    alone = {"rounds": 1, "materialised": False, "peers": False}
    return [
        Case(1024, 32000, 1024, rounds=5),
        Case(4096, 32000, 1024, rounds=5, peers=False),
        Case(16384, 32000, 256, **alone),
        Case(1024, 128256, 256, rounds=5, peers=False),
        Case(4096, 128256, 256, **alone),
        Case(16384, 128256, 256, **alone),
        Case(1024, 151936, 256, rounds=5, peers=False),
        Case(4096, 151936, 256, **alone),
        Case(16384, 151936, 256, **alone),
    ]


def rows(options: argparse.Namespace, deadline: Deadline) -> Iterator[dict[str, object]]:
    quick = options.quick
    for case in cases(quick, rest=options.rest):
        if deadline.passed:
            print(f"out of time: no rows of {case}", file=sys.stderr)
        else:
            yield from ({"part": "loss", **row} for row in measured(case, deadline))
    for fraction in (0.25,) if quick else (0.25, 0.5, 1.0):
        tokens, rounds = (256, 1) if quick else (1024, 5)
        if not deadline.passed and (options.rest or not GPU):
            yield {"part": "whole step", **measured_step(fraction, tokens, rounds)}


def main() -> None:
    parser = _results.parser(__doc__, timed=True, rest=True)
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak:
        name, sizes = options.peak
        case = Case(**json.loads(sizes))
        print(json.dumps(_peak(case, methods(case)[name])))
        return
    prepare()
    parts = _results.gathered(rows(options, Deadline(options.seconds)), as_json=options.json)
    note = (
        "Forward and backward of the forward KL. `ratio` is to materialised logits, round by\n"
        "round; `peak_mb` is above inputs and gradients. The whole step is of a small Llama that\n"
        "projects all positions or the supervised ones."
    )
    _results.finish("prediction", "Prediction loss", parts, options, note=note)


if __name__ == "__main__":
    main()
