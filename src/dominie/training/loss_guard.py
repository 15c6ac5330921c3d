"""Stops a step whose loss is not finite or jumps; warns of experts that are no longer used."""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from torch import nn

from dominie.core.errors import RunError
from dominie.core.io import write_json

FILE = "broken-step.json"
_NAMED = 8  # parameters and conversations in a message; the file has all conversations


class SpikeGuard:
    """Tells a loss that jumps.

    Args:
        factor: of the median of the last steps that a loss may reach; None allows all.
        window: how many steps those are.
        least: steps before any is judged.
    """

    def __init__(self, factor: float | None, *, window: int = 100, least: int = 20) -> None:
        self.factor, self.least = factor, least
        self._losses: deque[float] = deque(maxlen=window)

    def jumped_from(self, loss: float) -> float | None:
        """The median that a loss is too far above; None takes the loss in."""
        if self.factor is not None and len(self._losses) >= self.least:
            usual = median(self._losses)
            if loss > self.factor * usual:
                return usual
        self._losses.append(loss)
        return None


def not_finite(means: Mapping[str, Any], model: nn.Module | None) -> list[str]:
    """What is not finite: terms, sources' losses, and where no value tells, gradients.

    Args:
        means: of the meter.
        model: whose gradients are looked through; None where there are none yet.
    """
    found = [f"term {name}" for name, value in means["terms"].items() if not math.isfinite(value)]
    for source, values in means["sources"].items():
        found += [
            f"{name} of source {source}"
            for name, value in values.items()
            if not math.isfinite(value)
        ]
    if model is not None and not any(name.startswith("term ") for name in found):
        broken = (
            name
            for name, parameter in model.named_parameters()
            if parameter.grad is not None and not parameter.grad.isfinite().all()
        )
        found += [f"gradient of {name}" for _, name in zip(range(_NAMED), broken, strict=False)]
    return found


def broken_step(
    folder: Path,
    *,
    step: int,
    what: str,
    found: str,
    means: Mapping[str, Any],
    culprits: Iterable[str],
    conversations: list[dict[str, Any]],
    do: str,
) -> RunError:
    """The error that ends a stage, its particulars written to `broken-step.json`.

    Args:
        folder: of the stage.
        step: that is not taken.
        what: is wrong with it.
        found: the figures, in words.
        means: of the meter since the last line of metrics.
        culprits: what is not finite, by name.
        conversations: of the step, each with its source, its row there and its tokens.
        do: the next thing to try.
    """
    culprits = list(culprits)
    named = ", ".join(f"{each['source']}[{each['row']}]" for each in conversations[:_NAMED])
    more = " …" if len(conversations) > _NAMED else ""
    place = f"{folder / FILE} has them all"
    record = {
        "step": step,
        "what": what,
        "found": found,
        "not_finite": culprits,
        **{key: _spelt(value) for key, value in means.items()},
        "conversations": conversations,
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / FILE, record)
    except OSError as error:
        place = f"they could not be written down: {error.strerror}"
    told = f"{', '.join(culprits[:_NAMED])}; {found}" if culprits else found
    return RunError(
        what,
        where=f"stage {folder.name}, step {step}",
        found=told,
        do=f"{do}, or look at the training rows of this step: {named}{more} ({place})",
    )


def _spelt(value: Any) -> Any:
    """A value in which numbers that JSON does not know are words."""
    if isinstance(value, Mapping):
        return {key: _spelt(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_spelt(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


logger = logging.getLogger(__name__)

#: An expert with less than this of its fair share of the routing weight is not used …
STARVED = 0.1
#: … when it has been so for this many lines of metrics; a single one may be of a few tokens …
LINES = 3
#: … and this many steps: a router that is made anew prefers some, and mostly gets over it.
STEPS = 50


class ExpertCollapseWarning:
    """Looks at the routers' means line by line, and warns once a stage."""

    def __init__(self) -> None:
        self.warned = False
        self._starved: dict[tuple[int, int], list[int]] = {}

    def look(self, router: Mapping[str, Sequence[Sequence[float]]] | None, step: int) -> None:
        """Warn where an expert gets next to nothing, line after line.

        Args:
            router: as `MetricSums.means` has it; None of a dense student.
            step: of the line.
        """
        if router is None or self.warned:
            return
        for layer, load in enumerate(router["load"]):
            for expert, share in enumerate(load):
                place = (layer, expert)
                if share * len(load) >= STARVED:
                    self._starved.pop(place, None)
                    continue
                seen = self._starved.setdefault(place, [])
                seen.append(step)
                if len(seen) >= LINES and step - seen[0] >= STEPS and not self.warned:
                    self._warn(layer, expert, share)

    def _warn(self, layer: int, expert: int, share: float) -> None:
        self.warned = True
        logger.warning(
            "the router is collapsing: expert %d of layer %d gets %.2g %% of the routing weight. "
            "Where tokens go to some of the experts, load balancing keeps all in use: "
            "loss: {router: 0.01}",
            expert,
            layer,
            100 * share,
        )
