"""Training at the paper's geometry: tokens a second, share of the bound, memory, beside plain code.

A Mixtral-8x7B teaches a Mistral-7B: random weights of those shapes, bf16 over fp32 weights and
Adam, every step the one that a stage's trainer takes (`dominie.training`), optimiser included. All
weights, gradients and moments of 32 layers do not fit one GPU: fewer layers are run, and
`full_depth_tokens_per_second` is what 32 would come to at the same share of the bound, by the ratio
of the operations of a token. Jobs:

* KD + attention; KD, of prediction alone; KD + attention with four conversations packed to a row;
* DAE online: two teachers of the student's shape, every row with its source's; one teacher: the
  same with one of them; DAE from cache; next token: no teacher at all;
* KD + attention with Liger's fused norms, rotary embedding and gated products in the student, where
  it is installed, and so with twice the tokens a pass.

`plain` does the same job in the same trainer as the authors' code does it: all logits of both
models, whole attention maps (KD + attention), both teachers on every row (DAE). Where it does not
fit, its micro-batch is halved until it does; what did not is said. The `loss` of the first step is
the same within a hundredth, or the row says what is `wrong`; but from a cache, where dominie takes
the teacher's entropy as it was stored, plain code what the stored samples come to.

`of_bound` is the time of the operations that the job needs (student forward and backward, its
teacher's forward, heads of supervised positions, attention loss; nothing recomputed) at the rate
of the device's data sheet, over the time taken; `of_matrix_speed` the same at the speed of a large
matrix product here; `mfu` counts the student's forward and backward alone. A CPU has no data sheet
here: its rate is that of the product.

    python benchmarks/geometry.py [--quick] [--json] [--seconds 170] [--rest] [--only METHOD]

On a GPU rows of 2,048 tokens, first by dominie and then plainly; with ``--rest`` those of 1,024;
with ``--only dominie`` or ``--only plain`` one of the two.
``--quick`` runs tiny models of the same families through the same code within 50 seconds on two
cores; after ``--seconds`` no further job is begun, and what is left out is said. A job that fails
says so, and the others go on. A full run also writes a dated table to ``benchmarks/results``.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import _results
from _geometry_jobs import FULL_DEPTH, JOBS, LAYERS, Job, Laboratory
from _geometry_steps import fitting_steps
from _memory import prepare, released
from _results import GPU, Deadline, Row
from _speed import matrix_speed

from dominie.core.hardware import gpu_of_this_machine

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

#: Tokens of a forward pass, and forward passes of an optimiser step (the paper takes 64).
TOKENS, ACCUMULATED = (8192, 4) if GPU else (512, 1)
OURS, PLAIN = "dominie", "plain"


def job_row(
    laboratory: Laboratory, job: Job, length: int, scratch: Path, *, plain: bool, steps: int,
    deadline: Deadline, speed: float,
) -> tuple[Row, float | None]:  # fmt: skip
    """A job done by dominie, or plainly, as a row; and its tokens a second."""
    laboratory.only({"student", *(name for name, _ in job.teachers)})
    needed, whole = (laboratory.work(job, length, deep=deep) for deep in (False, True))
    micro_batch = max(1, TOKENS // length) * job.packed * job.wider
    batch = micro_batch * max(1, ACCUMULATED // job.wider)
    sources = laboratory.sources(job, length, rows=2 * batch)
    gpu = gpu_of_this_machine()
    peak = gpu.half if gpu else speed
    found, note, wrong = None, job.lacking, ""
    if deadline.passed:
        note = "out of time"
    elif not note:
        try:
            taught = laboratory.taught(job, sources, scratch, plain=plain)
            found, too_large = fitting_steps(
                laboratory.model("student"), taught, micro_batch=micro_batch,
                length=length, batch=batch, steps=steps, deadline=deadline, fused=job.fused,
            )  # fmt: skip
            if too_large:
                note = f"does not fit: {', '.join(map(str, too_large))} a pass"
        except ImportError as missing:
            if missing.name not in ("pyarrow", "pcodec"):  # which only a cache's files need
                raise
            note = f"needs {missing.name}"
        except Exception as error:
            wrong = _results.told(error)
    if job.fused:  # layers stay as they are
        laboratory.models.clear()
    released()
    rate = batch * (length // job.packed) / found.seconds if found else None
    row: Row = {
        "part": f"L = {length}",
        "job": job.name,
        "method": PLAIN if plain else OURS,
        "layers": LAYERS,
        "a_pass": found.micro_batch if found else None,
        "tokens_per_second": _rounded(rate),
        "step_seconds": _rounded(found.seconds if found else None, 3),
        "to_plain": None,
        "mfu": _percent(needed.student, rate, peak),
        "of_bound": _percent(needed.total, rate, peak),
        "of_matrix_speed": _percent(needed.total, rate, speed),
        "peak_gb": _gigabytes(found.peak if found else None),
        "with_models_gb": _gigabytes(
            (found.peak or 0) + found.standing if found and found.standing else None
        ),
        "full_depth_tokens_per_second": _rounded(
            rate * needed.total / whole.total if rate and GPU else None
        ),
        "steps": found.taken if found else 0,
        "loss": _rounded(found.loss if found else None, 4),
        "note": note or None,
        "wrong": wrong or None,
    }
    return row, rate


def _percent(operations: float, rate: float | None, speed: float) -> str | None:
    return None if rate is None else f"{100 * operations * rate / speed:.1f} %"


def _rounded(value: float | None, digits: int = 0) -> float | None:
    if value is None:
        return None
    return round(value, digits) if digits else int(value)


def _gigabytes(count: float | None) -> float | None:
    return None if count is None else round(count / 1e9, 2)


def measured(
    *, quick: bool, rest: bool, deadline: Deadline, methods: Sequence[str]
) -> Iterator[Row]:
    """All jobs of one length after the other, those by dominie first."""
    speed = matrix_speed()
    laboratory = Laboratory(LAYERS, tiny=not GPU)
    lengths = ((1024,) if rest else (2048,)) if GPU else (64,) if quick else (512, 256)
    for length in lengths:
        ours: dict[str, tuple[float | None, Any]] = {}
        with tempfile.TemporaryDirectory() as scratch:
            for method, job in [(m, j) for m in methods for j in JOBS if j.plain or m == OURS]:
                plain = method == PLAIN
                row, rate = job_row(
                    laboratory, job, length, Path(scratch), plain=plain, deadline=deadline,
                    steps=1 if quick else 3, speed=speed,
                )  # fmt: skip
                if not plain:
                    ours[job.name] = rate, row["loss"]
                elif rate and (beside := ours.get(job.name, (None, None)))[0]:
                    row["to_plain"] = round(beside[0] / rate, 2)
                    row["wrong"] = row["wrong"] or _differs(job, beside[1], row["loss"])
                yield row


def _differs(job: Job, ours: float, plains: float) -> str | None:
    if job.cached or abs(plains - ours) <= 0.01 * abs(ours):
        return None
    return f"its loss is {plains}, dominie's {ours}"


def main() -> None:
    parser = _results.parser(__doc__, timed=True, rest=True)
    parser.add_argument("--only", choices=(OURS, PLAIN), help="one of the two methods")
    options = parser.parse_args()
    prepare()
    rows = measured(
        quick=options.quick, rest=options.rest, deadline=Deadline(options.seconds),
        methods=(options.only,) if options.only else (OURS, PLAIN),
    )  # fmt: skip
    parts = _results.gathered(rows, as_json=options.json)
    note = (
        f"{LAYERS} of {FULL_DEPTH} layers of each model"
        + ("" if GPU else ", narrowed for a CPU: only ratios say anything")
        + f"; {TOKENS:,} tokens a forward pass, {ACCUMULATED} passes an optimiser step, three\n"
        "quarters of the tokens supervised. `peak_gb` is above the models' weights. No layer is\n"
        "recomputed. `to_plain`: tokens a second of dominie over plain's."
    )
    _results.finish("geometry", "Training at the paper's geometry", parts, options, note=note)


if __name__ == "__main__":
    main()
