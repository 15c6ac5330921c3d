"""FLOPs and time of a stage: FLOPs per token, and the roofline of a device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from dominie.core.hardware import NETWORK, PER_MACHINE, Device
from dominie.planning.memory import BYTES, StageSetup
from dominie.planning.sizes import Shape, shape_of

#: Share of a bound that well-written training reaches; `--efficiency` sets it.
EFFICIENCY = 0.4


@dataclass(frozen=True)
class Cost:
    """What a stage costs.

    Attributes:
        student_flops: per token: forward, backward, and the forward that checkpointing repeats.
        teacher_flops: per token, of its teachers' forward.
        seconds: of each bound, at full rate: products, memory traffic, traffic between devices.
        hours: of the whole stage, at the stated share of the bound that binds.
        tokens_per_second: over all devices.
    """

    student_flops: float
    teacher_flops: float
    seconds: Mapping[str, float]
    hours: float
    tokens_per_second: float

    @property
    def bound(self) -> str:
        """Which of the bounds binds."""
        return max(self.seconds, key=lambda name: self.seconds[name])


def forward_flops(shape: Shape, length: float) -> float:
    """Of one token among `length`: two for every weight it meets, and its attention."""
    attended = 2 * 2 * shape.layers * shape.heads * shape.head_width * length / 2
    return 2 * shape.multiplied + attended


def stage_cost(
    situation: StageSetup,
    *,
    device: Device,
    tokens: float,
    steps: int,
    trainable: float,
    shares: Mapping[str, float],
    efficiency: float = EFFICIENCY,
) -> Cost:
    """What a stage costs on `situation.ranks` devices.

    Args:
        situation: the stage.
        device: each of them.
        tokens: that the stage reads in all.
        steps: of the optimiser.
        trainable: parameters with a gradient.
        shares: of the tokens that each teacher speaks on.
        efficiency: share of the bound that is reached.
    """
    shape = shape_of(situation.student)
    once = forward_flops(shape, situation.length)
    passes = 2.0 if situation.train.lora else 3.0  # frozen weights get no gradient
    passes += 1.0 if situation.train.gradient_checkpointing else 0.0
    live = [t for t in situation.teachers if t.placement != "cached"]
    taught = sum(
        shares.get(t.name, 0.0) * forward_flops(shape_of(t.config), situation.length) for t in live
    )
    if situation.attention:  # both maps once more, and two products of their difference
        own = 2 * situation.attention * shape.heads * shape.head_width * situation.length / 2
        taught += 4 * own
    width = BYTES[situation.train.precision]
    ranks = situation.ranks
    train = situation.train
    forwards = steps * train.batch / ranks / train.conversations_per_forward(ranks)  # of a rank
    moved = forwards * passes * shape.parameters * width
    moved += (
        forwards
        / situation.ahead
        * sum(shape_of(t.config).parameters * BYTES[t.dtype] for t in live)
    )
    moved += (
        steps * trainable * 28 / situation.shards
    )  # weight, gradient and moments, there and back
    seconds = {
        "products": tokens
        * (passes * once + taught)
        / (ranks * device.flops(situation.train.precision)),
        "memory": moved / device.bandwidth,
    }
    if ranks > 1:
        seconds["network"] = _sent(situation, forwards, steps, trainable) / _link(device, ranks)
    hours = max(seconds.values()) / efficiency / 3600
    return Cost(passes * once, taught, seconds, hours, tokens / max(hours * 3600, 1e-9))


def _link(device: Device, ranks: int) -> float:
    """Bytes a second in which a rank gathers from all others.

    Between machines rings run over all network cards of each, and inside it what came is passed on.
    """
    return device.link if ranks <= PER_MACHINE else min(device.link, PER_MACHINE * NETWORK)


def _sent(situation: StageSetup, forwards: float, steps: int, trainable: float) -> float:
    """Bytes each rank receives: gathered weights and summed gradients, or gradients alone."""
    others = (situation.ranks - 1) / situation.ranks
    sharded = [t for t in situation.teachers if t.placement == "sharded"]
    passes = forwards / situation.ahead  # of a teacher
    gathered = passes * sum(shape_of(t.config).in_layers * BYTES[t.dtype] for t in sharded)
    if not situation.sharded:
        return (2 * steps * trainable * 4 + gathered) * others
    width = BYTES[situation.train.precision]
    gathers = 3 if situation.train.gradient_checkpointing else 2
    weights = shape_of(situation.student).parameters * width * gathers + trainable * 4
    return (forwards * weights + gathered) * others
