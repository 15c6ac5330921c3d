"""Time and memory of the prediction loss, beside materialised logits, TRL and Liger.

Forward and backward of the forward KL between two heads, on the same inputs in the same run. The
methods take turns, so that a busy machine is busy for all of them; a ratio is the median of the
ratios of the rounds. Peak memory is above the inputs and their gradients, and is taken by a
process of its own for each method (on a GPU by the allocator's own count).

    python benchmarks/prediction.py [--quick] [--json] [--seconds 45]

``--quick`` ends within 50 seconds on two cores; a full run also writes a dated table to
``benchmarks/results``. After ``--seconds`` no further case is begun. TRL and Liger are measured
where they are installed.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import _results
import torch
from _memory import resident
from _results import DEVICE, Deadline
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
        dtype = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
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
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0, compiled=DEVICE.type == "cuda"
    )
    labels = torch.zeros(len(hidden), dtype=torch.int64, device=DEVICE)
    return loss(hidden, head, teacher_hidden, teacher_head, labels) * len(hidden)


def methods(case: Case) -> dict[str, Callable[..., Tensor]]:
    """What can run here; peers where they are installed, and only in a full run."""
    found: dict[str, Callable[..., Tensor]] = {}
    if case.materialised:
        found["materialised"] = materialised
    found["dominie"] = dominie_torch
    if DEVICE.type == "cuda":
        found["dominie-triton"] = dominie_triton
    if case.peers and importlib.util.find_spec("trl"):
        found["trl"] = trl
    if case.peers and importlib.util.find_spec("liger_kernel"):
        found["liger"] = liger
    return found


def seconds(loss: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> tuple[float, float]:
    """Of forward and backward, and the loss."""
    for tensor in inputs:
        tensor.grad = None
    gc.collect()
    _wait()
    start = time.perf_counter()
    value = loss(*inputs)
    value.backward()
    _wait()
    return time.perf_counter() - start, value.item()


def _wait() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def peak_mebibytes(case: Case, name: str) -> float | None:
    """Above the inputs and gradients; None where the system does not say."""
    if DEVICE.type == "cuda":
        return _peak(case, methods(case)[name])
    command = [sys.executable, __file__, "--peak", name, json.dumps(asdict(case))]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(result.stdout)


def _peak(case: Case, loss: Callable[..., Tensor]) -> float | None:
    warm = Case(tokens=2, vocabulary=8, width=4, rounds=1).inputs()
    seconds(loss, warm)
    inputs = case.inputs()
    gradients = sum(x.numel() * x.element_size() for x in inputs if x.requires_grad)
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        seconds(loss, inputs)
        return (torch.cuda.max_memory_allocated() - before - gradients) / MEBIBYTE
    before = resident("VmRSS")
    seconds(loss, inputs)
    peak = resident("VmHWM")
    return None if peak is None or before is None else (peak - before - gradients) / MEBIBYTE


def measured(case: Case) -> Iterator[dict[str, object]]:
    """One row for each method."""
    inputs, losses = case.inputs(), methods(case)
    names = list(losses)
    times: dict[str, list[float]] = {name: [] for name in names}
    values: dict[str, float] = {}
    for turn in range(case.rounds + 1):
        for name in names:
            elapsed, values[name] = seconds(losses[name], inputs)
            if turn > 0 or case.rounds == 1:  # the first round warms up
                times[name].append(elapsed)
        if case.rounds == 1:
            break
    del inputs
    for name in names:
        if abs(values[name] - values["dominie"]) > 2e-3 * abs(values["dominie"]):
            raise SystemExit(f"{name} computes another loss: {values}")
        rounds = zip(times[name], times["materialised"], strict=True) if case.materialised else ()
        ratios = [own / reference for own, reference in rounds]
        yield {
            "tokens": case.tokens,
            "vocabulary": case.vocabulary,
            "width": case.width,
            "method": name,
            "seconds": round(statistics.median(times[name]), 4),
            "ratio": round(statistics.median(ratios), 3) if ratios else None,
            "peak_mb": _rounded(peak_mebibytes(case, name)),
            "rounds": len(times[name]),
            "device": DEVICE.type,
        }


def _rounded(value: float | None) -> int | None:
    return None if value is None else round(value)


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

    def step(rows: Tensor, weights: Tensor | None) -> float:
        model.zero_grad()
        _wait()
        start = time.perf_counter()
        hidden = model(ids).last_hidden_state[0]
        target = (teacher[0][rows], teacher[1])
        loss = vocabulary_losses(hidden[rows], head, target, divergence_weights=weights)
        loss.total.backward()
        _wait()
        return time.perf_counter() - start

    everything = torch.ones_like(supervised)
    pairs = [
        (step(everything, supervised.float()), step(supervised, None)) for _ in range(rounds + 1)
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


def cases(quick: bool) -> list[Case]:
    if quick:
        return [Case(512, 32000, 256, rounds=2, peers=False)]
    if DEVICE.type == "cuda":
        return [
            Case(tokens, vocabulary, 4096, rounds=10, materialised=tokens <= 8192)
            for tokens in (1024, 4096, 8192, 16384)
            for vocabulary in (32000, 128256, 151936)
        ]
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


def rows(quick: bool, deadline: Deadline) -> Iterator[dict[str, object]]:
    for fraction in (0.25,) if quick else (0.25, 0.5, 1.0):
        tokens, rounds = (256, 1) if quick else (1024, 5)
        yield {"part": "whole step", **measured_step(fraction, tokens, rounds)}
    for case in cases(quick):
        if deadline.passed:
            print(f"out of time: no rows of {case}", file=sys.stderr)
        else:
            yield from ({"part": "loss", **row} for row in measured(case))


def main() -> None:
    parser = _results.parser(__doc__, timed=True)
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak:
        name, sizes = options.peak
        case = Case(**json.loads(sizes))
        print(json.dumps(_peak(case, methods(case)[name])))
        return
    parts = _results.gathered(rows(options.quick, Deadline(options.seconds)), as_json=options.json)
    note = (
        "Forward and backward of the forward KL. `ratio` is to materialised logits, round by\n"
        "round; `peak_mb` is above inputs and gradients. The whole step is of a small Llama that\n"
        "projects all positions or the supervised ones."
    )
    _results.finish("prediction", "Prediction loss", parts, options, note=note)


if __name__ == "__main__":
    main()
