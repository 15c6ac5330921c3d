"""Watches a stage while it trains: what is measured, losses that jump, experts not used."""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerState
from transformers.trainer_callback import ExportableState

from dominie.core.errors import RunError
from dominie.core.io import write_json
from dominie.losses.objective import Objective
from dominie.training.counters import FlopsMeter
from dominie.training.metric_sums import MetricsLog
from dominie.training.validation import Validation

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Monitor:
    """What a trainer measures and where it writes it.

    Attributes:
        sources: names of all sources by index, those that are only watched last.
        log: `metrics.jsonl`.
        flops: counts the operations of its steps.
        terms: names of the loss terms that are logged; None is all.
        validation: the forgetting curve, None without validation splits.
        epochs: passes over the largest source that the whole run makes, for display.
    """

    sources: Sequence[str]
    log: MetricsLog
    flops: FlopsMeter
    terms: Collection[str] | None = None
    validation: Validation | None = None
    epochs: float = 1.0

    def epoch(self, state: TrainerState) -> float:
        """Passes over the largest source so far."""
        return round(self.epochs * int(state.global_step) / max(int(state.max_steps), 1), 4)

    def begin(self, model: nn.Module, accelerator: Any) -> None:
        """Look at the student as its stage begins, see `Validation.begin`."""
        if self.validation is not None:
            self.validation.begin(model, accelerator)

    def check_divergence(
        self, means: Mapping[str, Mapping[str, float]], objective: Objective, *, where: str
    ) -> None:
        """Refuse a source's mean divergence that is further below zero than samples explain.

        No divergence is negative, but its estimate from a cache's samples can be, times T². The
        deviation of a token's was 0.26 nats with 50 samples and 0.03 with the default
        (docs/cache.md): five times one nat over the square root of the tokens is allowed, and 0.05.

        Args:
            means: of each source, with `tokens` and `divergence`.
            objective: the losses of the sources.
            where: the stage and its step.

        Raises:
            RunError: names the sources.
        """
        found = []
        for name, terms in zip(self.sources, objective.by_source, strict=True):
            mean, prediction = means.get(name, {}), terms.prediction
            if prediction is None or "divergence" not in mean:
                continue
            noise = 0.05 + 5.0 / math.sqrt(max(mean["tokens"], 1))
            if mean["divergence"] < -noise * prediction.temperature**2:
                found.append(f"{name}: {mean['divergence']:.4g} nats per token")
        if found:
            raise RunError(
                "a divergence from a teacher is negative, beyond noise",
                where=where,
                found="; ".join(found),
                do="remove its cache, which does not hold what the teacher predicts",
            )


FILE = "broken-step.json"
_TRAIN_ANEW = (
    "the last checkpoint is kept; the same command would stop here again. Move the stage's folder "
    "away and train it anew with a lower train.learning_rate"
)
_NAMED = 8  # parameters and conversations in a message; the file has all conversations


class SpikeGuard(TrainerCallback, ExportableState):
    """Detects a loss that jumps; a checkpoint keeps the losses that it compares with.

    Args:
        factor: of the median of the last steps that a loss may reach; None allows all.
        window: how many steps those are.
        least: steps before any is judged.
    """

    def __init__(self, factor: float | None, *, window: int = 100, least: int = 20) -> None:
        self.factor, self.least, self.window = factor, least, window
        self.losses: list[float] = []

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, as transformers wants it."""
        return {"args": {}, "attributes": {"losses": list(self.losses)}}

    @property
    def advice(self) -> str:
        """What to do about a loss that jumps."""
        return (
            "the last checkpoint is kept: to go on from it, raise train.max_spike, now "
            f"{self.factor:g}"
        )

    def exceeded_median(self, loss: float) -> float | None:
        """The median that a loss is too far above; None takes the loss in."""
        if self.factor is not None and len(self.losses) >= self.least:
            median_loss = median(self.losses)
            if loss > self.factor * median_loss:
                return median_loss
        self.losses = [*self.losses, loss][-self.window :]
        return None


def broken_step(
    folder: Path,
    *,
    step: int,
    what: str,
    found: str,
    means: Mapping[str, Any],
    model: nn.Module | None,
    conversations: list[dict[str, Any]],
    do: str | None = None,
) -> RunError:
    """The error that ends a stage, its particulars written to `broken-step.json`.

    Args:
        folder: of the stage.
        step: that is not taken.
        what: is wrong with it.
        found: the figures, as text.
        means: of the metrics since their last line.
        model: whose gradients are looked through; None where there are none yet.
        conversations: of the step, each with its source, its row there and its tokens.
        do: the next thing to try; None is to train anew at a lower rate.
    """
    broken = _not_finite(means, model)
    named = ", ".join(f"{each['source']}[{each['row']}]" for each in conversations[:_NAMED])
    more = " …" if len(conversations) > _NAMED else ""
    details = f"{folder / FILE} has them all"
    record = {
        "step": step,
        "what": what,
        "found": found,
        "not_finite": broken,
        **{key: _plain_json(value) for key, value in means.items()},
        "conversations": conversations,
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / FILE, record)
    except OSError as error:
        details = f"they could not be written: {error.strerror}"
    return RunError(
        what,
        where=f"stage {folder.name}, step {step}",
        found=f"{', '.join(broken[:_NAMED])}; {found}" if broken else found,
        do=f"{do or _TRAIN_ANEW}, or look at the training rows of this step: {named}{more} "
        f"({details})",
    )


def _not_finite(means: Mapping[str, Any], model: nn.Module | None) -> list[str]:
    """What is not finite: terms, sources' losses, and if no term is to blame, gradients."""
    terms = [f"term {name}" for name, value in means["terms"].items() if not math.isfinite(value)]
    found = terms + [
        f"{name} of source {source}"
        for source, values in means["sources"].items()
        for name, value in values.items()
        if not math.isfinite(value)
    ]
    if model is not None and not terms:
        broken = (
            name
            for name, parameter in model.named_parameters()
            if parameter.grad is not None and not parameter.grad.isfinite().all()
        )
        found += [f"gradient of {name}" for _, name in zip(range(_NAMED), broken, strict=False)]
    return found


def _plain_json(value: Any) -> Any:
    """A value in which numbers that JSON does not have are texts."""
    if isinstance(value, Mapping):
        return {key: _plain_json(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain_json(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


#: An expert with less than this of its fair share of the routing weight is not used …
STARVED = 0.1
#: … when it has been so for this many lines of metrics; a single one may be of a few tokens …
LINES = 3
#: … and this many steps: a freshly initialised router prefers some, and mostly recovers.
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
                if len(seen) >= LINES and step - seen[0] >= STEPS:
                    self.warned = True
                    logger.warning(
                        "the router is collapsing: expert %d of layer %d gets %.2g %% of the "
                        "routing weight. Where tokens go to some of the experts, load balancing "
                        "keeps all in use: loss: {router: 0.01}",
                        expert,
                        layer,
                        100 * share,
                    )
                    return
