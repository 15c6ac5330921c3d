"""Tile sizes of the attention kernels: those that fit, and the fastest of them on this GPU."""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
import triton
from triton.errors import TritonError

if TYPE_CHECKING:
    from dominie.losses.attention_rows import Projections

logger = logging.getLogger(__name__)

KERNELS = ("statistics", "query_gradient", "key_gradient")
VARIABLE = "DOMINIE_ATTENTION_BLOCKS"
"""Of the environment: `default`, or `outer,inner,warps,stages`; then nothing is measured."""


@dataclass(frozen=True)
class Blocks:
    """Sizes of the tiles: ``outer`` positions stay, ``inner`` positions are walked over."""

    outer: int
    inner: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Shape:
    """What the best tiles depend on.

    Attributes:
        width: head size of the student.
        teacher_width: that of the teacher.
        dtype: of the student.
        teacher_dtype: of the teacher.
        group: teacher heads to a head of the student; several are read again and again.
    """

    width: int
    teacher_width: int
    dtype: torch.dtype
    teacher_dtype: torch.dtype
    group: int = 1

    @staticmethod
    def of(student: Projections, teacher: Projections) -> Shape:
        """The shape of a pair of layers."""
        return Shape(
            student.query.shape[3],
            teacher.query.shape[3],
            student.query.dtype,
            teacher.query.dtype,
            teacher.heads // student.heads,
        )


#: Milliseconds of a kernel with some tiles, as a GPU takes them.
Measure: TypeAlias = Callable[[str, Blocks], float]

#: Bytes of shared memory that a block of threads may have: H100 and H200 227 KiB, A100 163, others
#: 99.
_LARGE, _MEDIUM = 200 * 1024, 160 * 1024
#: Positions from which on a sweep is worth its seconds; shorter rows always have the default.
_LONG = 1024
#: What else may be faster than a default: two blocks of threads to a multiprocessor, so that one
#: computes exponentials while the other multiplies, or one stage more of loads ahead.
_OTHERS = {
    Blocks(128, 64, 8, 3): (Blocks(64, 64, 4, 3), Blocks(128, 32, 4, 3), Blocks(64, 64, 4, 2)),
    Blocks(128, 64, 8, 2): (
        Blocks(64, 64, 4, 2),
        Blocks(128, 64, 8, 3),
        Blocks(64, 32, 4, 3),
        Blocks(128, 32, 8, 2),
        Blocks(64, 32, 4, 2),
    ),
    Blocks(128, 32, 8, 2): (Blocks(64, 32, 8, 3), Blocks(64, 16, 4, 3)),
}
_found: dict[str, Mapping[str, Blocks]] = {}  # the fastest tiles of each kernel, by `_name`


def candidates(shape: Shape, device: torch.device) -> tuple[Blocks, ...]:
    """Tiles whose operands fit registers and shared memory; the first is the default.

    `tests/losses/compile_kernels.py` compiles them for Hopper, and tells what each takes: in 16
    bits and with one teacher head to one of the student, where there are several, none spills a
    register. GPUs with less shared memory get smaller tiles.
    """
    size = max(shape.dtype.itemsize, shape.teacher_dtype.itemsize)
    row = max(16, shape.width, shape.teacher_width) * size  # bytes
    shared = _LARGE
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        shared = getattr(properties, "shared_memory_per_block_optin", 0)
    if shared < (_MEDIUM if shape.group == 1 else _LARGE):
        row *= 2
    if row <= 128:  # heads of 64 in bfloat16
        default = Blocks(128, 64, 8, 3)
    elif row <= 256:  # heads of 128 in bfloat16
        default = Blocks(128, 64 if shape.group == 1 else 32, 8, 2)
    elif row > 512:
        default = Blocks(32, 16, 4, 1)
    elif size == 4:  # three products of tf32 for one want more registers
        default = Blocks(64, 16, 4, 2)
    elif shared >= _LARGE and shape.group == 1:
        default = Blocks(128, 32, 8, 2)
    else:
        default = Blocks(64, 32, 4, 2)
    return default, *(_OTHERS.get(default, ()) if size == 2 and shape.group == 1 else ())


def blocks_of(
    shape: Shape, device: torch.device, length: int, measure: Measure
) -> Mapping[str, Blocks]:
    """The tiles of each kernel.

    On a GPU those that were fastest when rows of at least `_LONG` positions first came: they are
    measured once, kept for this process and, by device and version of Triton, in the user's cache
    folder. Sums are added in another order with other tiles: results agree to rounding only.

    Args:
        shape: head sizes and dtypes.
        device: where the kernels run.
        length: positions of a row.
        measure: times a kernel; it may raise where the tiles do not fit.

    Raises:
        ValueError: the variable of the environment holds no tiles.
    """
    options = candidates(shape, device)
    default = dict.fromkeys(KERNELS, options[0])
    if given := os.environ.get(VARIABLE):
        return default if given == "default" else dict.fromkeys(KERNELS, _parsed(given))
    if device.type != "cuda" or len(options) == 1 or length < _LONG:
        return default
    name = _name(shape, device)
    if name not in _found:
        kept = _kept(name, options)
        _found[name] = kept or _fastest(options, measure)
        if not kept:
            _keep(name, _found[name])
            chosen = {kernel: astuple(blocks) for kernel, blocks in _found[name].items()}
            logger.info("tiles of the attention kernels for %s: %s", name, chosen)
    return _found[name]


def _fastest(options: tuple[Blocks, ...], measure: Measure) -> dict[str, Blocks]:
    """For each kernel the fastest of the tiles that run; the first where none does."""
    fastest = {}
    for kernel in KERNELS:
        times = {}
        for blocks in options:
            with contextlib.suppress(TritonError, RuntimeError):  # too large for this GPU, say
                times[blocks] = measure(kernel, blocks)
        fastest[kernel] = min(times, key=lambda blocks: times[blocks]) if times else options[0]
    return fastest


def _parsed(text: str) -> Blocks:
    try:
        outer, inner, warps, stages = (int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(
            f"{VARIABLE} is `default` or `outer,inner,warps,stages`, as 128,64,8,2; found {text!r}"
        ) from None
    return Blocks(outer, inner, warps, stages)


def _name(shape: Shape, device: torch.device) -> str:
    """What measured tiles are kept under."""
    where = f"{torch.cuda.get_device_name(device)}, triton {triton.__version__}"
    return f"{where}, {', '.join(str(part) for part in astuple(shape))}"


def _place() -> Path:
    home = os.environ.get("XDG_CACHE_HOME")
    return Path(home or Path.home() / ".cache") / "dominie" / "attention_blocks.json"


def _read() -> dict[str, Any]:
    """What was measured before; nothing where the file is not there or not readable."""
    with contextlib.suppress(OSError, RuntimeError, ValueError):
        found = json.loads(_place().read_text("utf-8"))
        return found if isinstance(found, dict) else {}
    return {}


def _kept(name: str, options: tuple[Blocks, ...]) -> dict[str, Blocks] | None:
    """The tiles of each kernel that were measured before, if all are among the options."""
    by_list = {tuple(astuple(blocks)): blocks for blocks in options}
    with contextlib.suppress(AttributeError, KeyError, TypeError):
        return {kernel: by_list[tuple(_read()[name][kernel])] for kernel in KERNELS}
    return None


def _keep(name: str, found: Mapping[str, Blocks]) -> None:
    place = _place()
    entry = {kernel: astuple(blocks) for kernel, blocks in found.items()}
    with contextlib.suppress(OSError, RuntimeError):  # then it is measured again next time
        place.parent.mkdir(parents=True, exist_ok=True)
        part = place.with_name(f"{place.name}.{os.getpid()}")
        part.write_text(json.dumps({**_read(), name: entry}, indent=1), "utf-8")
        part.replace(place)
