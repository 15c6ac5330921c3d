"""Every backend of `attention_divergence` against row-by-row loops in float64."""

from __future__ import annotations

import itertools
import os
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor

from dominie.losses.attention import attention_divergence

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

BACKENDS = ["eager", "tiles", "sdpa"]
# The interpreter subtracts infinities in places that are thrown away.
quiet = pytest.mark.filterwarnings("ignore::RuntimeWarning")
full = pytest.mark.full
EXACT = 3e-6 if DEVICE == "cpu" else 2e-5  # on a GPU float32 products are three of tf32
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")


def oracle(
    student_query: Tensor,
    student_key: Tensor,
    teacher_query: Tensor,
    teacher_key: Tensor,
    *,
    row_weights: Tensor,
    student_scale: float,
    teacher_scale: float,
    sliding_window: int | None = None,
    segment_ids: Tensor | None = None,
) -> Tensor:
    """The definition, one row of one head at a time."""
    batch, heads, length, _ = student_query.shape
    teacher_heads = teacher_query.shape[1]
    group = teacher_heads // heads
    total = torch.zeros((), dtype=torch.float64)
    for b, h, i in itertools.product(range(batch), range(teacher_heads), range(length)):
        seen = [
            j
            for j in range(i + 1)
            if (sliding_window is None or i - j < sliding_window)
            and (segment_ids is None or segment_ids[b, i] == segment_ids[b, j])
        ]
        s, t = h // group, h * teacher_key.shape[1] // teacher_heads
        k = s * student_key.shape[1] // heads
        student = (student_scale * student_key[b, k, seen] @ student_query[b, s, i]).log_softmax(0)
        teacher = (teacher_scale * teacher_key[b, t, seen] @ teacher_query[b, h, i]).log_softmax(0)
        total = total + row_weights[b, i] * (teacher.exp() * (teacher - student)).sum() / group
    return total


def problem(
    batch: int = 2,
    heads: int = 4,
    key_heads: int = 2,
    teacher_heads: int = 4,
    teacher_key_heads: int = 2,
    length: int = 7,
    width: int = 8,
    teacher_width: int = 8,
    seed: int = 0,
) -> dict[str, Tensor | float]:
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return {
        "student_query": drawn(batch, heads, length, width).requires_grad_(),
        "student_key": drawn(batch, key_heads, length, width).requires_grad_(),
        "teacher_query": drawn(batch, teacher_heads, length, teacher_width),
        "teacher_key": drawn(batch, teacher_key_heads, length, teacher_width),
        "row_weights": torch.rand(batch, length, generator=generator, dtype=torch.float64),
        "student_scale": width**-0.5,
        "teacher_scale": 1.3 * teacher_width**-0.5,
    }


def moved(arguments, dtype: torch.dtype, device: str = DEVICE):
    """The arguments in another dtype, differentiable again."""
    found = {
        name: value.detach().to(device, dtype) if isinstance(value, Tensor) else value
        for name, value in arguments.items()
    }
    for name in ("student_query", "student_key"):
        found[name].requires_grad_()
    return found


@pytest.fixture
def mended_interpreter(monkeypatch):
    """Triton's interpreter holds bf16 as 16-bit integers, and multiplies matrices of those."""
    if DEVICE == "cuda" or find_spec("triton") is None:
        return
    import numpy as np
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def widened(data):
        is_bf16 = data.dtype == np.uint16
        return (data.astype(np.uint32) << 16).view(np.float32) if is_bf16 else data

    def create_dot(self, a, b, d, *_):
        product = np.matmul(widened(a.data), widened(b.data), dtype=d.data.dtype)
        return TensorHandle(product + d.data, d.dtype.scalar)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)


def value_and_gradients(function, arguments, **options) -> tuple[Tensor, Tensor, Tensor]:
    value = function(**arguments, **options)
    gradients = torch.autograd.grad(
        3.0 * value, (arguments["student_query"], arguments["student_key"])
    )
    return value.detach(), *gradients


def assert_same(found, expected, tolerance: float = 1e-10) -> None:
    for name, a, b in zip(("value", "query", "key"), found, expected, strict=True):
        torch.testing.assert_close(
            a, b, rtol=tolerance, atol=tolerance, msg=lambda m, name=name: f"{name}: {m}"
        )


ORACLES: dict[tuple[object, ...], list[Tensor]] = {}
SEGMENTS = {
    "one": None,
    "packed": [[0, 0, 0, 1, 1, 2, 2, 2, 2, 3, 3], [0, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2]],
    "broken": [[0, 1, 0, 1, 0, 1, 2, 2, 0, 3, 1], [5, 5, 3, 3, 5, 5, 3, 9, 9, 9, 9]],
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("segments", SEGMENTS)
@pytest.mark.parametrize("window", [None, 1, 3, 50])
@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"heads": 4, "key_heads": 4, "teacher_heads": 4, "teacher_key_heads": 1},
        {"heads": 2, "key_heads": 1, "teacher_heads": 6, "teacher_key_heads": 3},
        {"heads": 3, "key_heads": 3, "teacher_heads": 6, "teacher_key_heads": 2},
        {"width": 5, "teacher_width": 12},
        {"width": 16, "teacher_width": 3},
    ],
    ids=str,
)
def test_backends_agree_with_the_definition(backend, segments, window, shape) -> None:
    arguments = problem(length=11, **shape)
    ids = SEGMENTS[segments]
    options = {
        "sliding_window": window,
        "segment_ids": None if ids is None else torch.tensor(ids),
    }
    arguments["row_weights"][0, 2:5] = 0
    known = ORACLES.setdefault((segments, window, str(shape)), [])
    if not known:  # once for all backends
        known += value_and_gradients(oracle, arguments, **options)
    found = value_and_gradients(attention_divergence, arguments, backend=backend, **options)
    assert_same(found, known)


@pytest.mark.parametrize("backend", ["tiles", "sdpa"])
@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("packed", [False, True])
def test_long_rows_are_split_and_agree_with_maps(backend, window, packed, monkeypatch) -> None:
    from dominie.losses import attention_backends

    monkeypatch.setattr(attention_backends, "_CPU_TILE", 4096)
    monkeypatch.setattr(attention_backends, "_WINDOW_BLOCK", 64)
    arguments = problem(length=203)
    generator = torch.Generator().manual_seed(1)
    kept = torch.rand(2, 203, generator=generator) < 0.4
    arguments["row_weights"] = arguments["row_weights"] * kept
    segments = (torch.rand(2, 203, generator=generator) < 0.03).cumsum(1) if packed else None
    options = {"sliding_window": window, "segment_ids": segments}
    expected = value_and_gradients(attention_divergence, arguments, backend="eager", **options)
    found = value_and_gradients(attention_divergence, arguments, backend=backend, **options)
    assert_same(found, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_is_exact_without_the_value(backend) -> None:
    arguments = problem()
    expected = value_and_gradients(attention_divergence, arguments, backend=backend)
    found = value_and_gradients(attention_divergence, arguments, backend=backend, value=False)
    assert found[0] == 0
    assert_same(found[1:] + expected[:1], expected[1:] + expected[:1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend) -> None:
    arguments = problem(batch=1, heads=2, key_heads=1, teacher_heads=2, length=5, width=3)

    def divergence(query: Tensor, key: Tensor) -> Tensor:
        changed = arguments | {"student_query": query, "student_key": key}
        return attention_divergence(**changed, backend=backend)

    inputs = (arguments["student_query"], arguments["student_key"])
    assert torch.autograd.gradcheck(divergence, inputs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [True, False])
def test_no_weighted_row_gives_zero_loss_and_zero_gradient(backend, value) -> None:
    arguments = problem()
    arguments["row_weights"] = torch.zeros(2, 7)
    found = value_and_gradients(attention_divergence, arguments, backend=backend, value=value)
    assert all((part == 0).all() for part in found)


@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_attention_has_no_divergence(backend) -> None:
    arguments = problem()
    arguments["teacher_query"] = arguments["student_query"].detach()
    arguments["teacher_key"] = arguments["student_key"].detach()
    arguments["teacher_scale"] = arguments["student_scale"]
    for part in value_and_gradients(attention_divergence, arguments, backend=backend):
        torch.testing.assert_close(part, torch.zeros_like(part), atol=1e-13, rtol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_extreme_scores_stay_finite(backend) -> None:
    arguments = problem()
    for name in ("student_scale", "teacher_scale"):
        arguments[name] = 200.0
    float32 = moved(arguments, torch.float32, "cpu")
    found = value_and_gradients(attention_divergence, float32, backend=backend)
    assert all(torch.isfinite(part).all() for part in found)
    expected = value_and_gradients(oracle, arguments)
    torch.testing.assert_close(found[0].double(), expected[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_weighted_row_counts_as_deleting_the_others_does(backend) -> None:
    arguments = problem()
    weights = torch.zeros(2, 7, dtype=torch.float64)
    weights[1, 3] = 1
    alone = value_and_gradients(
        attention_divergence, arguments | {"row_weights": weights}, backend=backend
    )
    query, key = alone[1:]
    assert (query[0] == 0).all()
    assert (key[0] == 0).all()
    assert (query[1, :, [0, 1, 2, 4, 5, 6]] == 0).all()
    assert (key[1, :, 4:] == 0).all()
    assert (query[1, :, 3] != 0).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", [*BACKENDS, pytest.param("triton", marks=needs_triton)])
def test_lower_precision_keeps_its_dtype_in_gradients(backend, dtype, mended_interpreter) -> None:
    arguments = moved(problem(length=40, width=32, teacher_width=32), dtype)
    exact = moved(arguments, torch.float64, "cpu")
    found = value_and_gradients(attention_divergence, arguments, backend=backend)
    expected = value_and_gradients(attention_divergence, exact, backend="eager")
    assert found[0].dtype == torch.float32
    assert found[1].dtype == found[2].dtype == dtype
    tolerance = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    for a, b in zip(found, expected, strict=True):
        assert (a.double().cpu() - b).norm() <= tolerance * b.norm()


@pytest.mark.parametrize("backend", ["tiles", pytest.param("triton", marks=needs_triton)])
@pytest.mark.parametrize("distance", [0.3, 0.03, 0.003])
def test_nothing_cancels_as_the_student_nears_the_teacher(
    backend, distance, mended_interpreter
) -> None:
    arguments = moved(problem(length=40, width=32, teacher_width=32), torch.bfloat16)
    noisy = problem(length=40, width=32, teacher_width=32, seed=1)
    arguments["teacher_scale"] = arguments["student_scale"]
    for name in ("query", "key"):
        near = arguments[f"student_{name}"].detach()
        near = near + distance * noisy[f"teacher_{name}"].to(near)
        arguments[f"teacher_{name}"] = near.bfloat16()
    exact = moved(arguments, torch.float64, "cpu")
    found = value_and_gradients(attention_divergence, arguments, backend=backend)
    expected = value_and_gradients(attention_divergence, exact, backend="eager")
    for a, b in zip(found[1:], expected[1:], strict=True):
        assert (a.double().cpu() - b).norm() <= 0.01 * b.norm()


def test_autocast_does_not_reach_the_scores() -> None:
    arguments = moved(problem(), torch.float32, "cpu")
    plain = value_and_gradients(attention_divergence, arguments, backend="tiles")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = value_and_gradients(attention_divergence, arguments, backend="tiles")
    assert_same(cast, plain, tolerance=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"teacher_query": torch.zeros(2, 6, 7, 8)}, "not a multiple of the student's 4"),
        ({"teacher_key": torch.zeros(2, 3, 7, 8)}, "not a multiple of 3 key heads"),
        ({"teacher_query": torch.zeros(2, 4, 6, 8)}, "expected 2 rows of 7 positions"),
        ({"teacher_query": torch.zeros(2, 4, 7, 9)}, "teacher: expected query"),
        ({"student_query": torch.full((2, 4, 7, 8), torch.nan)}, "student: query or key is not"),
        ({"teacher_key": torch.full((2, 2, 7, 8), torch.inf)}, "teacher: query or key is not"),
        ({"row_weights": torch.zeros(2, 6)}, "row_weights"),
        ({"segment_ids": torch.zeros(1, 7)}, "segment_ids"),
        ({"sliding_window": 0}, "sliding_window"),
        ({"backend": "flash"}, "backend: expected one of auto"),
    ],
)
def test_bad_input_is_named(change, message) -> None:
    with pytest.raises(ValueError, match=message):
        attention_divergence(**(problem() | change))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [True, False])
def test_only_query_and_key_of_the_student_are_saved(backend, value) -> None:
    saved: list[Tensor] = []
    hooks = torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor
    )
    arguments = problem()
    with hooks:
        attention_divergence(**arguments, backend=backend, value=value)
    expected = [arguments["student_query"].data_ptr(), arguments["student_key"].data_ptr()]
    assert [tensor.data_ptr() for tensor in saved] == expected


@pytest.fixture
def small_blocks(monkeypatch):
    """Several blocks for a few positions."""
    monkeypatch.setenv("DOMINIE_ATTENTION_BLOCKS", "32,16,4,1")


@needs_triton
@quiet
@pytest.mark.parametrize("segments", ["one", "packed", "broken"])
@pytest.mark.parametrize("window", [None, 9, *(pytest.param(n, marks=full) for n in (1, 30))])
@pytest.mark.parametrize(
    "shape",
    [
        {"heads": 2, "key_heads": 1, "teacher_heads": 2, "teacher_key_heads": 1},
        {"heads": 1, "key_heads": 1, "teacher_heads": 3, "teacher_key_heads": 3, "batch": 1},
        {"heads": 2, "key_heads": 2, "teacher_heads": 2, "width": 5, "teacher_width": 20},
    ],
    ids=str,
)
def test_kernels_agree_with_maps(segments, window, shape, small_blocks) -> None:
    length = 50
    arguments = problem(length=length, **shape)
    batch = len(arguments["row_weights"])
    generator = torch.Generator().manual_seed(1)
    arguments["row_weights"][0, :33] = 0
    arguments["row_weights"][1:] *= torch.rand(length, generator=generator) < 0.3
    ids = {
        "one": None,
        "packed": (torch.rand(batch, length, generator=generator) < 0.05).cumsum(1),
        "broken": torch.randint(3, (batch, length), generator=generator),
    }[segments]
    options = {"sliding_window": window, "segment_ids": ids}
    expected = value_and_gradients(attention_divergence, arguments, backend="eager", **options)
    options["segment_ids"] = None if ids is None else ids.to(DEVICE)
    found = value_and_gradients(
        attention_divergence, moved(arguments, torch.float32), backend="triton", **options
    )
    for a, b in zip(found, expected, strict=True):
        assert (a.double().cpu() - b).norm() <= EXACT * b.norm() + 1e-6


@needs_triton
def test_kernels_read_any_layout_and_write_every_element(small_blocks) -> None:
    arguments = moved(problem(length=40), torch.float32)
    expected = value_and_gradients(attention_divergence, arguments, backend="tiles")
    strided = dict(arguments)
    for name in ("student_query", "student_key", "teacher_query", "teacher_key"):
        strided[name] = arguments[name].transpose(1, 2).contiguous().transpose(1, 2)
    strided["teacher_key"] = strided["teacher_key"].transpose(2, 3).contiguous().transpose(2, 3)
    value = attention_divergence(**strided, backend="triton")
    inputs = (arguments["student_query"], arguments["student_key"])
    found = (value.detach(), *torch.autograd.grad(3.0 * value, inputs))
    for a, b in zip(found, expected, strict=True):
        assert (a - b).norm() <= EXACT * b.norm()


@needs_triton
@pytest.mark.parametrize("value", [True, False])
def test_kernels_without_a_weighted_row_give_zero(value, small_blocks) -> None:
    arguments = moved(problem(length=40), torch.float32)
    arguments["row_weights"].zero_()
    found = value_and_gradients(attention_divergence, arguments, backend="triton", value=value)
    assert all((part == 0).all() for part in found)


@needs_triton
def test_kernels_survive_a_loss_scale_in_half_precision(small_blocks) -> None:
    arguments = moved(problem(length=40, width=16, teacher_width=16), torch.float16)
    exact = moved(arguments, torch.float64)
    inputs = ("student_query", "student_key")
    scaled = 2.0**14 * attention_divergence(**arguments, backend="triton", value=False)
    found = torch.autograd.grad(scaled, [arguments[name] for name in inputs])
    expected = torch.autograd.grad(
        2.0**14 * attention_divergence(**exact, backend="tiles"), [exact[name] for name in inputs]
    )
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == torch.float16
        assert (a.double() - b).norm() <= 2e-3 * b.norm()


def test_float64_is_not_for_kernels() -> None:
    with pytest.raises(ValueError, match="triton cannot run here"):
        attention_divergence(**problem(), backend="triton")
