"""Tile sizes of the attention kernels: every one gives the same, and the fastest is chosen once."""

from __future__ import annotations

import json
from dataclasses import astuple
from importlib.util import find_spec

import pytest
import torch

from dominie.losses.attention import attention_divergence

if find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

from dominie.losses import triton_attention_blocks as tuning
from dominie.losses.triton_attention import trials
from dominie.losses.triton_attention_blocks import KERNELS, VARIABLE, Blocks, Shape, blocks_of

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CARD, PROCESSOR = torch.device("cuda"), torch.device("cpu")
MISTRAL = Shape(128, 128, torch.bfloat16, torch.bfloat16)
SHAPES = [
    Shape(width, width, dtype, dtype, group)
    for width in (16, 64, 128, 256, 512)
    for dtype in (torch.bfloat16, torch.float32)
    for group in (1, 2)
]
OPTIONS = {blocks for shape in SHAPES for blocks in tuning.candidates(shape, PROCESSOR)}
#: Warps and stages are nothing to the interpreter; other tests use 32 × 16.
SIZES = OPTIONS if DEVICE == "cuda" else {(b.outer, b.inner): b for b in OPTIONS}.values()
SIZES = [
    pytest.param(blocks, marks=[] if blocks.inner == 64 else pytest.mark.full, id=str(blocks))
    for blocks in sorted(SIZES, key=astuple)
    if blocks.outer > 32
]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("blocks", SIZES)
def test_every_tile_size_gives_the_same(blocks, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    length = blocks.outer + 20

    def drawn(heads):
        return torch.randn(1, heads, length, 16, generator=generator).to(DEVICE)

    student = [drawn(heads).requires_grad_() for heads in (1, 1)]
    arguments = {
        "row_weights": torch.rand(1, length, generator=generator).to(DEVICE),
        "student_scale": 0.3,
        "teacher_scale": 0.4,
        "segment_ids": (torch.arange(length, device=DEVICE) // 50)[None],
        "sliding_window": 30,
    }
    arguments["row_weights"][0, 20:40] = 0
    teacher = [drawn(1), drawn(1)]
    values = {}
    for backend in ("tiles", "triton"):
        monkeypatch.setenv(VARIABLE, ",".join(str(part) for part in astuple(blocks)))
        loss = attention_divergence(*student, *teacher, **arguments, backend=backend)
        values[backend] = [loss.detach(), *torch.autograd.grad(loss, student)]
    for found, wanted in zip(values["triton"], values["tiles"], strict=True):
        assert (found - wanted).norm() <= 2e-5 * wanted.norm()


@pytest.fixture
def card(monkeypatch, tmp_path):
    """A GPU that is not there, with a cache folder of its own and a list of what is measured."""
    properties = type("Properties", (), {"shared_memory_per_block_optin": 232448})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr(tuning, "_found", {})
    return []


def measure(card, times):
    """Times by (kernel, outer, inner); what is not among them does not run."""

    def milliseconds(kernel, blocks):
        card.append((kernel, blocks))
        if (kernel, blocks.outer, blocks.inner) not in times:
            raise RuntimeError("out of resources: shared memory")
        return times[kernel, blocks.outer, blocks.inner] + blocks.stages / 1000

    return milliseconds


TIMES = {
    **{(kernel, 128, 64): 1.0 for kernel in KERNELS},
    ("statistics", 64, 64): 0.8,
    ("query_gradient", 64, 64): 1.2,
}
FASTEST = {
    "statistics": Blocks(64, 64, 4, 2),
    "query_gradient": Blocks(128, 64, 8, 2),
    "key_gradient": Blocks(128, 64, 8, 2),
}


def test_each_kernel_has_the_fastest_that_runs(card, tmp_path, monkeypatch):
    assert blocks_of(MISTRAL, CARD, 2048, measure(card, TIMES)) == FASTEST
    options = tuning.candidates(MISTRAL, CARD)
    assert card == [(kernel, blocks) for kernel in KERNELS for blocks in options]
    card.clear()
    assert blocks_of(MISTRAL, CARD, 4096, measure(card, {})) == FASTEST
    monkeypatch.setattr(tuning, "_found", {})  # another process
    assert blocks_of(MISTRAL, CARD, 2048, measure(card, {})) == FASTEST
    assert card == []
    (name,) = json.loads((tmp_path / "dominie" / "attention_blocks.json").read_text())
    assert name.startswith("NVIDIA H100, triton 3.")
    assert "128, 128, torch.bfloat16, torch.bfloat16, 1" in name


def test_head_sizes_are_chosen_apart(card, tmp_path):
    small = Shape(64, 64, torch.bfloat16, torch.bfloat16)
    for shape in (MISTRAL, small):
        blocks_of(shape, CARD, 2048, measure(card, TIMES))
    assert len(json.loads((tmp_path / "dominie" / "attention_blocks.json").read_text())) == 2


@pytest.mark.parametrize("text", ["", "[1]", "{", '{"NAME": 3}', '{"NAME": {"statistics": [1]}}'])
def test_a_damaged_file_is_measured_anew(card, tmp_path, text):
    file = tmp_path / "dominie" / "attention_blocks.json"
    file.parent.mkdir()
    file.write_text(text.replace("NAME", tuning._name(MISTRAL, CARD)))
    assert blocks_of(MISTRAL, CARD, 2048, measure(card, TIMES)) == FASTEST
    assert card


def test_the_default_where_nothing_runs_and_nothing_is_kept(card, tmp_path):
    (tmp_path / "dominie").write_text("no folder")
    found = blocks_of(MISTRAL, CARD, 2048, measure(card, {}))
    assert set(found.values()) == {Blocks(128, 64, 8, 2)}


@pytest.mark.parametrize(
    ("device", "length", "shape"),
    [
        (PROCESSOR, 2048, MISTRAL),
        (CARD, 1023, MISTRAL),
        (CARD, 2048, Shape(128, 128, torch.float32, torch.float32)),  # one size fits
    ],
)
def test_nothing_is_measured_for_nothing(card, device, length, shape):
    found = blocks_of(shape, device, length, measure(card, TIMES))
    assert set(found.values()) == {tuning.candidates(shape, device)[0]}
    assert card == []


def test_the_environment_fixes_the_choice(card, monkeypatch):
    for text, blocks in [("default", (128, 64, 8, 2)), ("64,32,4,3", (64, 32, 4, 3))]:
        monkeypatch.setenv(VARIABLE, text)
        found = blocks_of(MISTRAL, CARD, 2048, measure(card, TIMES))
        assert set(found.values()) == {Blocks(*blocks)}
    assert card == []
    monkeypatch.setenv(VARIABLE, "64,32")
    with pytest.raises(ValueError, match="DOMINIE_ATTENTION_BLOCKS is `default` or"):
        blocks_of(MISTRAL, CARD, 2048, measure(card, TIMES))


def test_a_gpu_with_less_shared_memory_has_smaller_tiles(card, monkeypatch):
    properties = type("Properties", (), {"shared_memory_per_block_optin": 99 * 1024})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert tuning.candidates(MISTRAL, CARD) == (Blocks(64, 32, 4, 2),)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("group", [1, 2])
def test_what_is_timed_runs(group):
    shape = Shape(16, 16, torch.float32, torch.float32, group)
    before = torch.random.get_rng_state()
    launches = trials(shape, torch.device(DEVICE), Blocks(32, 16, 4, 1), heads=2, length=20)
    assert tuple(launches) == KERNELS
    for launch in launches.values():
        launch()
    assert torch.equal(torch.random.get_rng_state(), before)
