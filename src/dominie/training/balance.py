"""How much the tokens of each source weigh in a step's loss, so that a share is one of the loss.

Of source d let g_d be its share among the sources present in an optimiser step, N_d its supervised
tokens over all micro-batches and ranks, N = Σ N_d. Under `balance: tokens` each of its tokens
weighs w_d = g_d · N / N_d, and the loss, divided by N as always, is Σ_d g_d · mean_d. Weights are
known before the first backward pass, so that the loss stays a sum over tokens; Σ w_d · N_d = N
whatever is absent, short or capped, so that learning rate and clipping keep their meaning.

A gap that is followed (Open-MOPD, arXiv 2608.19098) moves shares among the sources that have an
expert, towards those that are further from theirs.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from dominie.core.errors import InputError

if TYPE_CHECKING:
    from dominie.losses.terms import LossTerms

#: What following the gap multiplies a share by, at least and at most.
LEAST, MOST = 0.05, 20.0


@dataclass(frozen=True, kw_only=True)
class Balance:
    """What the shares of a stage's sources are shares of.

    Attributes:
        by: `conversations`: every supervised token weighs 1, so that a source of short answers has
            less of the loss than its share of conversations. `tokens`: the tokens of a source
            weigh together as much as its share says, in every optimiser step that has any.
        gap: α, 1 to begin with: an expert's source weighs (m / mean of m)^α times as much, from
            0.05 to 20, where m is its running mean divergence per token; their sum stays, and so
            does the weight of a source whose teacher is what the student starts as. None follows
            no gap.
        cap: the largest weight of a token; what a source does not get for it, the others get.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "strict": True}
    by: Literal["conversations", "tokens"] = "conversations"
    gap: float | None = None
    cap: float = 20.0

    def __post_init__(self) -> None:
        if self.gap is not None and not 0.0 < self.gap <= 10.0:
            raise ValueError(f"gap must be above 0 and at most 10, got {self.gap}")
        if not 1.0 <= self.cap < math.inf:
            raise ValueError(f"cap must be finite and at least 1, got {self.cap}")
        if self.by != "tokens" and (self.gap is not None or self.cap != Balance.cap):
            raise ValueError("gap and cap are of balance by tokens: add by: tokens")


def token_weights(shares: Sequence[float], tokens: Sequence[float], cap: float) -> list[float]:
    """w_d of each source: what its tokens weigh in a step, so that Σ w_d · N_d = N.

    A source that would be above the cap gets the cap; what it lacks, the others share, in
    proportion to their shares.

    Args:
        shares: of the sources, of any sum; those present are normalised.
        tokens: N_d, the supervised tokens of each over the whole step.
        cap: at least 1.

    Returns:
        Weights, 1 for a source without tokens.
    """
    weights, left = [1.0] * len(tokens), float(sum(tokens))
    free = {source: shares[source] for source, count in enumerate(tokens) if count}
    while free:
        whole = sum(free.values())
        found = {s: share / whole * left / tokens[s] for s, share in free.items()}
        over = [source for source, weight in found.items() if weight > cap]
        for source, weight in found.items():
            weights[source] = min(weight, cap)
        left -= sum(cap * tokens[source] for source in over)
        free = {source: share for source, share in free.items() if over and source not in over}
    return weights


def following(
    shares: Sequence[float], gaps: Mapping[int, float], power: float, present: Collection[int]
) -> list[float]:
    """The shares with those of experts' sources moved towards the largest gaps; their sum stays.

    Args:
        shares: of all sources.
        gaps: m of the sources that have an expert and have been seen, in nats per token.
        power: α.
        present: the sources of the step: m̄ is their mean.
    """
    seen = {source: max(gap, 0.0) for source, gap in gaps.items() if source in present}
    mean = sum(seen.values()) / max(len(seen), 1)
    if mean <= 0.0:
        return list(shares)
    moved = {
        source: shares[source] * min(max((gap / mean) ** power, LEAST), MOST)
        for source, gap in seen.items()
    }
    scale = sum(shares[source] for source in seen) / sum(moved.values())
    return [moved[s] * scale if s in moved else share for s, share in enumerate(shares)]


def check_gap(
    losses: Mapping[str, LossTerms],
    teachers: Mapping[str, str | None],
    references: Collection[str],
    *,
    one_source_a_step: bool,
    where: str,
) -> None:
    """Refuse to follow a gap where sources have none, or none that can be compared.

    Args:
        losses: of the sources that a stage learns from.
        teachers: of the same sources.
        references: those whose teacher is what the student starts as.
        one_source_a_step: whether a step's conversations are all of one source.
        where: the path of the stage.

    Raises:
        InputError: names the source.
    """
    here = f"{where}.train.balance.gap"
    for source, loss in losses.items():
        if teachers[source] is None or not loss.weighs("prediction"):
            raise InputError(
                f"source {source} has no gap to its teacher",
                where=here,
                expected="a teacher and a prediction loss on every source",
                found=f"{source} without a {'prediction loss' if teachers[source] else 'teacher'}",
                do="remove gap, or give the source a teacher and a prediction loss",
            )
    experts = [source for source in losses if source not in references]
    if len(experts) < 2:
        raise InputError(
            "a gap is followed among sources that have an expert, and there are not two",
            where=here,
            expected="two or more sources whose teacher is not what the student starts as",
            found=", ".join(experts) or "none",
            do="remove gap",
        )
    compared = {(p.kind, p.temperature, p.beta) for s in experts if (p := losses[s].prediction)}
    if len(compared) > 1:
        raise InputError(
            "the gaps of these sources are different quantities",
            where=here,
            expected="one kind, temperature and beta of the prediction loss on experts' sources",
            found=f"different ones on {', '.join(experts)}",
            do="remove gap, or make them equal",
        )
    if one_source_a_step:
        raise InputError(
            "a gap moves weight within a step, and each step has one source",
            where=here,
            expected="mixing: conversations or micro_batches",
            found="mixing: steps",
            do="remove gap, or change train.mixing",
        )
