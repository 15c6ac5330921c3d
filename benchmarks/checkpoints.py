"""What a checkpoint costs that is verified and on the disk, beside a plain one of the same content.

The plain way is what transformers does: weights by `save_pretrained`, the optimiser's state by
`torch.save`, nothing hashed and nothing synced. Ours writes the same files and a manifest of
SHA-256, syncs every file and renames the folder; files are hashed, and taken in by the disk, while
others are written. The two take turns; ratios are medians over the
rounds. Reading back is verified here and not there.

    python benchmarks/checkpoints.py [--quick] [--json]

``--quick`` ends within 50 seconds on two cores; a full run also writes a dated table to
``benchmarks/results``.
"""

from __future__ import annotations

import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import _results
import torch
from _results import DEVICE, Row
from transformers import MistralConfig, MistralForCausalLM

from dominie.core.whole_folders import HashedFiles, publish
from dominie.training.checkpoints import fault, seal

if TYPE_CHECKING:
    from collections.abc import Iterator


def trained(width: int, layers: int) -> tuple[MistralForCausalLM, torch.optim.Optimizer]:
    """A model and its AdamW after a step, whose two moments are as large as the weights each."""
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=4096,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=max(1, width // 256),
    )
    model = MistralForCausalLM(config).to(DEVICE)
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 1e-3)
    optimizer.step()
    optimizer.zero_grad()
    return model, optimizer


def plain(folder: Path, model: Any, optimizer: torch.optim.Optimizer) -> None:
    """As transformers writes it."""
    model.save_pretrained(folder)
    torch.save(optimizer.state_dict(), folder / "optimizer.pt")


def verified(folder: Path, model: Any, optimizer: torch.optim.Optimizer) -> None:
    """As dominie writes it."""
    scratch = folder.with_name(".writing")
    with HashedFiles(scratch) as hashed:
        model.save_pretrained(scratch)
        hashed.begin()
        with hashed.stream(scratch / "optimizer.pt") as file:
            torch.save(optimizer.state_dict(), file)
        seal(scratch, files=hashed.manifest())
    publish(scratch, folder)


def read_plain(folder: Path) -> None:
    """The optimiser's state, taken as it stands."""
    torch.load(folder / "optimizer.pt", weights_only=True)


def read_verified(folder: Path) -> None:
    """The optimiser's state, once every file of the checkpoint is known to be as it was written."""
    assert fault(folder) is None
    read_plain(folder)


def spent(work: Callable[..., None], *arguments: Any) -> tuple[float, float]:
    """(wall, CPU) seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    work(*arguments)
    return time.perf_counter() - wall, time.process_time() - cpu


def measured(width: int, layers: int, rounds: int) -> Row:
    """One size of a model."""
    model, optimizer = trained(width, layers)
    times: list[list[tuple[float, float]]] = []
    with tempfile.TemporaryDirectory() as place:
        theirs, ours = Path(place) / "plain", Path(place) / "verified"
        for _ in range(rounds):
            shutil.rmtree(theirs, ignore_errors=True)
            shutil.rmtree(ours, ignore_errors=True)
            times.append(
                [
                    spent(plain, theirs, model, optimizer),
                    spent(verified, ours, model, optimizer),
                    spent(read_plain, theirs),
                    spent(read_verified, ours),
                ]
            )
        size = sum(file.stat().st_size for file in ours.iterdir())

    def median(way: int) -> float:
        return round(statistics.median(each[way][0] for each in times), 3)

    def ratio(way: int, other: int, clock: int) -> float:
        return round(statistics.median(e[way][clock] / e[other][clock] for e in times), 2)

    return {
        "parameters": f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f}M",
        "megabytes": round(size / 2**20),
        "plain_seconds": median(0),
        "verified_seconds": median(1),
        "write_ratio": ratio(1, 0, 0),
        "write_ratio_cpu": ratio(1, 0, 1),
        "read_ratio": ratio(3, 2, 0),
        "read_ratio_cpu": ratio(3, 2, 1),
    }


def rows(quick: bool) -> Iterator[Row]:
    """One row for each size of a model."""
    for width, layers in [(256, 4)] if quick else [(256, 4), (512, 8), (960, 12)]:
        yield measured(width, layers, rounds=3 if quick else 5)


def main() -> None:
    """Measure, print, and after a full run write down."""
    options = _results.parser(__doc__).parse_args()
    parts = _results.gathered(rows(options.quick), as_json=options.json)
    note = "Ratios are of the verified checkpoint to the plain one, by wall and by CPU time."
    _results.finish("checkpoints", "Checkpoints", parts, options, note=note)


if __name__ == "__main__":
    main()
