"""Weighs the tokens of each optimiser step by their source, and counts what shares result.

Of source d let g_d be its share among the sources present in an optimiser step, N_d its supervised
tokens over all micro-batches and ranks, N = Σ N_d. Under `balance: tokens` each of its tokens
weighs w_d = g_d · N / N_d, and the loss, divided by N as always, is Σ_d g_d · mean_d. Weights are
known before the first backward pass, so that the loss stays a sum over tokens; Σ w_d · N_d = N
whatever is absent, short or capped, so that learning rate and clipping keep their meaning.

A gap that is followed (Open-MOPD, arXiv 2608.19098) moves shares among the sources that have an
expert, towards those that are further from theirs.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from dominie.core.distributed import world_size
from dominie.data.batch import Batch, Row, to_device
from dominie.training.settings import Balance, TrainSettings
from dominie.training.stage_sources import StageSource, schedule_of

logger = logging.getLogger(__name__)

#: What following the gap multiplies a share by, at least and at most.
LEAST, MOST = 0.05, 20.0
#: What of the running mean of a gap is kept at each step that has the source.
KEPT = 0.9
#: Turns of a mix that are looked at to foretell its shares.
_TURNS = 20_000
#: Rows of a source that are looked at for the length of its answers.
_ROWS = 1_000


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


class SourceWeights:
    """The weights of a stage's sources, step by step (`KeepGaps` keeps gaps in checkpoints).

    Args:
        sources: names of all sources by index.
        shares: of the same, 0 for one that is only watched; None is equal ones.
        balance: the stage's `train.balance`; None weighs every token 1.
        experts: indices of the sources whose gaps are followed, where any are.

    Attributes:
        gaps: running mean divergence from its expert of each source seen so far, in nats per token.
    """

    def __init__(
        self,
        sources: Sequence[str],
        shares: Sequence[float] | None = None,
        balance: Balance | None = None,
        experts: Collection[int] = (),
    ) -> None:
        self.sources, self.balance = list(sources), balance or Balance(by="conversations")
        self.shares = [1.0] * len(self.sources) if shares is None else list(shares)
        self.experts = set() if self.balance.gap is None else set(experts)
        self.gaps: dict[str, float] = {}
        self._measured: Tensor | None = None  # [sources, 2] of the step: divergence, its tokens
        self._capped = False
        self._begin_line()

    def _begin_line(self) -> None:
        self._steps, self._parts = 0, [0.0] * len(self.sources)

    def of_step(self, tokens: Sequence[float], *, step: int | None = None) -> list[float]:
        """What a token of each source weighs in a step.

        Args:
            tokens: supervised ones of each source, over all micro-batches and ranks.
            step: for the notice of a weight that is capped; None gives none.
        """
        weights = [1.0] * len(self.sources)
        if self.balance.by == "tokens":
            present = {source for source, count in enumerate(tokens) if count}
            gaps = {s: self.gaps[n] for s in self.experts if (n := self.sources[s]) in self.gaps}
            shares = following(self.shares, gaps, self.balance.gap or 0.0, present)
            weights = token_weights(shares, tokens, self.balance.cap)
            if step is not None:
                self._tell_of_cap(weights, tokens, step)
        if (total := sum(tokens)) > 0:
            self._steps += 1
            for source, count in enumerate(tokens):
                self._parts[source] += weights[source] * count / total
        return weights

    def _tell_of_cap(self, weights: Sequence[float], tokens: Sequence[float], step: int) -> None:
        capped = [s for s, weight in enumerate(weights) if weight >= self.balance.cap > 1.0]
        if capped and not self._capped:
            self._capped = True
            logger.warning(
                "step %d: the %d supervised tokens of %s are so few that their weight is capped at "
                "%g; the other sources get what is left, and the sum stays (said once; loss_share "
                "in metrics.jsonl shows what comes of it)",
                step,
                tokens[capped[0]],
                self.sources[capped[0]],
                self.balance.cap,
            )

    # The gaps --------------------------------------------------------------------------------

    def measure(self, by_source: Tensor, columns: Sequence[str]) -> None:
        """Take in the sums of a forward pass, if gaps are followed (`Losses.by_source`)."""
        if self.experts:
            sums = by_source[:, [columns.index("divergence"), columns.index("taught")]].double()
            self._measured = sums if self._measured is None else self._measured + sums

    def end_step(self, reduce: Callable[[Tensor], Tensor]) -> None:
        """Move the gaps towards those of the step that ends.

        Args:
            reduce: sums a tensor over ranks.
        """
        if self._measured is None:
            return
        sums, self._measured = reduce(self._measured).tolist(), None
        for source in sorted(self.experts):
            divergence, tokens = sums[source]
            if tokens:
                name, gap = self.sources[source], divergence / tokens
                self.gaps[name] = KEPT * self.gaps.get(name, gap) + (1 - KEPT) * gap

    def log_entry(self) -> dict[str, dict[str, float]]:
        """For a line of `metrics.jsonl`, by source; that of the next line begins here.

        `loss_share` is the part of a step's loss that the source would have if all tokens had the
        same loss, in the mean over steps: Σ weights of its tokens / Σ weights of all. A stage of
        one source has none. `gap` is the running mean, where it is followed.
        """
        entry: dict[str, dict[str, float]] = {}
        if sum(share > 0 for share in self.shares) > 1 and self._steps:
            for name, part in zip(self.sources, self._parts, strict=True):
                if part:
                    entry[name] = {"loss_share": round(part / self._steps, 6)}
        for name, gap in self.gaps.items():
            entry.setdefault(name, {})["gap"] = gap
        self._begin_line()
        return entry


def weighted(batches: Sequence[Batch], weights: Sequence[float], dtype: torch.dtype) -> list[Batch]:
    """Micro-batches whose tokens weigh as much more as their sources do; the same if those weigh 1.

    Args:
        batches: of one optimiser step, on one device.
        weights: by source index.
        dtype: of the weights that come of it.
    """
    if all(weight == 1.0 for weight in weights):
        return list(batches)
    factors = to_device(torch.tensor(weights, dtype=dtype), batches[0].source_ids.device)
    found = []
    for batch in batches:
        of_tokens = factors[batch.source_ids.clamp(min=0)]  # padding has no label to weigh
        own = batch.weights
        found.append(replace(batch, weights=of_tokens if own is None else of_tokens * own))
    return found


@dataclass(frozen=True)
class Shares:
    """Fractions that a source of a mix is of a stage's conversations, supervised tokens and loss.

    Attributes:
        source: its name.
        conversations: as the recipe has it, of a sum of 1.
        tokens: supervised ones.
        loss: of its weight: what the source would have of the loss if all tokens had the same one.
    """

    source: str
    conversations: float
    tokens: float
    loss: float

    @property
    def short(self) -> bool:
        """Whether its part of the loss is less than a third of its share."""
        return 3 * self.loss < self.conversations


def planned_shares(
    sources: Sequence[StageSource], settings: TrainSettings, *, answers: float = 0.0
) -> tuple[Shares, ...]:
    """Foretell the shares of a stage's sources from the mean lengths of their answers.

    Gaps, which nobody knows before the training, count as equal.

    Args:
        sources: of a stage, those that are only watched included.
        settings: its `train`.
        answers: tokens of an answer where the data have none: the student's are to come.

    Returns:
        Of each source its shares; none for a stage of one source, and where rows are not there yet.
    """
    active = [source for source in sources if source.share > 0]
    if len(active) < 2 or not all(len(source.train) for source in active):
        return ()
    micro_batch = settings.conversations_per_forward(world_size())
    mix = schedule_of(active, settings).mix(settings, micro_batch=micro_batch)
    means = [_mean_tokens(source.train) or answers for source in active]
    weights = SourceWeights([s.name for s in active], mix.shares.tolist(), settings.balance)
    total = [0.0] * len(active)
    for counts in mix.counts(max(1, _TURNS * mix.turn // mix.batch)):
        tokens = [count * mean for count, mean in zip(counts, means, strict=True)]
        weights.of_step(tokens)
        total = [sum(each) for each in zip(total, tokens, strict=True)]
    loss = weights.log_entry()
    return tuple(
        Shares(name, share, tokens / (sum(total) or 1.0), loss.get(name, {}).get("loss_share", 0.0))
        for name, share, tokens in zip(weights.sources, weights.shares, total, strict=True)
    )


def _mean_tokens(rows: Sequence[Row]) -> float:
    """Supervised tokens of a conversation, in the mean over some that are spread over all."""
    some = range(0, len(rows), -(-len(rows) // _ROWS))
    return sum(int(np.count_nonzero(rows[i].supervised[1:])) for i in some) / len(some)


def share_lines(stage: str, shares: Sequence[Shares], settings: TrainSettings) -> Iterator[str]:
    """Tell the three shares of a stage's sources, and warn of a loss that is not as it seems.

    Args:
        stage: its name.
        shares: of `planned_shares`.
        settings: the stage's `train`.
    """
    if not shares:
        return
    told = [
        f"{each.source} {_percent(each.conversations)}, {_percent(each.tokens)}, "
        f"{_percent(each.loss)}"
        for each in shares
    ]
    yield f"{stage}: shares of conversations, tokens and loss: {'; '.join(told)}"
    balanced = settings.balance.by == "tokens"
    for each in shares:
        if each.short:
            do = (
                "few steps have it, or its weight is capped: raise train.batch"
                if balanced
                else "set train.balance: tokens to make its share one of the loss"
            )
            yield (
                f"warning: {stage}: {each.source} is {_percent(each.conversations)} of the "
                f"conversations and {_percent(each.loss)} of the loss; {do}"
            )


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"
