"""Writes a model's predictions as the rows of a cache, and measures what is lost."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from dominie.data.batch import Batch, Row, collate
from dominie.data.shards import Entry
from dominie.losses.targets import SparseTarget
from dominie.losses.tiles import sum_precision
from dominie.models.head import decoder, output_head, padding_for
from dominie.teachers.cache_codec import Coder
from dominie.teachers.cache_sampling import CacheSettings, Chosen, TokenStats, choose, joined
from dominie.teachers.cached import key_of_row

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Elements of one tile of logits. Large enough for a fast product, small beside any model.
_CPU_TILE_ELEMENTS = 1 << 21
_CPU_BLOCK_ELEMENTS = 1 << 19
_DEVICE_TILE_ELEMENTS = 1 << 26
_CPU_BATCH_TOKENS = 2048
_DEVICE_BATCH_TOKENS = 16384
_CALIBRATION_TOKENS = 4096


@torch.no_grad()
def entries(
    model: Any,
    rows: Sequence[Row],
    vocabulary: TokenStats,
    settings: CacheSettings,
    *,
    temperature: float,
    owner: bytes = b"",
) -> list[Entry]:
    """The rows of a cache for one batch of conversations, in their order.

    Only supervised positions meet the head, a tile of them at a time.

    Args:
        model: the teacher.
        rows: conversations with at least one supervised token each.
        vocabulary: of the cache.
        settings: what is stored.
        temperature: of the softmax.
        owner: of the cache.
    """
    coder, keys = Coder.of(vocabulary, settings, owner), [key_of_row(row) for row in rows]
    pooled = vocabulary.is_pooled if settings.scheme == "threshold" else None
    pool = None if pooled is None else torch.from_numpy(pooled).to(model.device)
    batch = collate([(0, row) for row in rows], padding=padding_for(model)).to(model.device)
    sizes = np.array(batch.supervised_by_row)
    # Draws come from the conversation alone: written again, it is the same.
    draws = torch.from_numpy(
        np.concatenate(
            [
                settings.draws(int(size), _generator(key))
                for key, size in zip(keys, sizes, strict=True)
            ]
        )
    ).to(model.device)
    parts, start = [], 0
    for logits in tiles_of_logits(model, batch, len(coder.ids), temperature):
        # On a CPU of so few tokens that the passes over them find them in cache.
        on_cpu = logits.device.type == "cpu"
        size = _CPU_BLOCK_ELEMENTS // logits.shape[1] if on_cpu else len(logits)
        for block in torch.split(logits, max(1, size)):
            stop = start + len(block)
            parts.append(choose(block, settings, draws[start:stop].to(block.dtype), pool))
            start = stop
    chosen = joined(parts).split(sizes)
    return [
        Entry(key, len(each), coder.encoded(each, key))
        for key, each in zip(keys, chosen, strict=True)
    ]


def tiles_of_logits(
    model: Any, batch: Batch, vocabulary: int, temperature: float
) -> Iterator[Tensor]:
    """[n, V] logits of the supervised positions over the temperature, a tile after the other.

    Every tile is written into the same memory. Ids from `vocabulary` on are padding of the head
    and are left out.
    """
    states = decoder(model)(**batch.model_inputs()).last_hidden_state
    hidden = states.flatten(0, 1)[batch.positions]
    head = output_head(model).constant()
    precision = sum_precision(head.weight.dtype)
    elements = _CPU_TILE_ELEMENTS if hidden.device.type == "cpu" else _DEVICE_TILE_ELEMENTS
    step = max(16, elements // head.vocabulary_size)
    room = hidden.new_empty((min(step, len(hidden)), head.vocabulary_size), dtype=precision)
    for start in range(0, len(hidden), step):
        states = hidden[start : start + step]
        logits = room[: len(states)]
        head.write_logits(states.to(head.weight.dtype), out=logits)
        if head.softcap is not None:
            logits.div_(head.softcap).tanh_().mul_(head.softcap)
        yield logits[:, :vocabulary].div_(temperature)


def in_batches(rows: Sequence[Row], order: Sequence[int], tokens: int) -> Iterator[list[Row]]:
    """Conversations of like length together, so many tokens at most with their padding.

    The longest come first: what does not fit into memory shows at once.
    """
    lengths = {index: len(rows[index].input_ids) for index in order}
    batch: list[Row] = []
    longest = 0
    for index in sorted(order, key=lambda i: (-lengths[i], i)):
        longest = max(longest, lengths[index])
        if batch and longest * (len(batch) + 1) > tokens:
            yield batch
            batch, longest = [], lengths[index]
        batch.append(rows[index])
    if batch:
        yield batch


def batch_tokens(model: Any) -> int:
    """Tokens, padding included, in a forward pass of a teacher that writes its cache."""
    return _CPU_BATCH_TOKENS if model.device.type == "cpu" else _DEVICE_BATCH_TOKENS


@torch.no_grad()
def measure_token_stats(
    model: Any, rows: Sequence[Row], size: int, settings: CacheSettings, *, temperature: float
) -> TokenStats:
    """Mean probabilities over some 4,096 tokens of these rows."""
    total, tails = (torch.zeros(size, dtype=torch.float64) for _ in range(2))
    seen = 0
    for batch in in_batches(rows, range(min(len(rows), 64)), batch_tokens(model)):
        padded = collate([(0, row) for row in batch], padding=padding_for(model))
        for logits in tiles_of_logits(model, padded.to(model.device), size, temperature):
            p = logits.softmax(-1)
            total += p.sum(0).double().cpu()
            tails += p.masked_fill_(p >= settings.threshold, 0.0).sum(0).double().cpu()
            seen += len(logits)
        if seen >= _CALIBRATION_TOKENS:
            break
    ids = total.argsort(descending=True, stable=True).numpy()
    return TokenStats(ids, (tails / max(seen, 1)).float().numpy(), settings.pooled)


def _generator(key: bytes) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64([zlib.crc32(key), *key]))


@dataclass(frozen=True, kw_only=True)
class Fidelity:
    """Means over tokens; p is the teacher's distribution, q the stored one, in nats.

    Attributes:
        entries: ids stored of a token.
        missing_mass: of p, on ids that are not stored.
        excess_kl: KL(q ‖ p), with the tail as one outcome if it is stored so. What samples have
            of it is noise, which averages out over tokens; what a tail's shape was is not in it.
        uniform_kl: KL(p ‖ q) with the tail spread evenly over the ids that are not stored;
            infinite if nothing stands for them, as with samples.
        squared_error: Σ (q − p)², the tail spread so. The noise that samples add to a gradient.
        teacher_entropy: of p.
    """

    entries: float
    missing_mass: float
    excess_kl: float
    uniform_kl: float
    squared_error: float
    teacher_entropy: float

    def as_dict(self) -> dict[str, float | None]:
        """The figures as JSON has them: an infinite one is null."""
        return {
            name: round(value, 6) if math.isfinite(value) else None
            for name, value in asdict(self).items()
        }


@torch.no_grad()
def fidelity(target: SparseTarget, logits: Tensor) -> Fidelity:
    """Compares a stored target with logits [N, V] over the temperature it was stored at."""
    log_p = logits.double().log_softmax(-1)
    p = log_p.exp()
    stored, tail = target.outcomes(torch.float64)
    used = target.ids >= 0
    q = torch.zeros_like(p).scatter_add_(1, target.ids.long().clamp_min(0), stored)
    is_stored = torch.zeros_like(p).scatter_add_(1, target.ids.long().clamp_min(0), used.double())
    if target.pool is not None:
        shape, mass = target.pool
        q[:, : len(shape)] += mass.double()[:, None] * shape.double()
        is_stored[:, : len(shape)] += shape > 0
    absent = is_stored == 0
    missing = (p * absent).sum(-1)
    excess = (torch.xlogy(q, q) - q * log_p).sum(-1)
    if tail is not None:
        excess += torch.xlogy(tail, tail) - torch.xlogy(tail, missing.clamp_min(1e-300))
        q = q + absent * (tail / absent.sum(-1).clamp_min(1))[:, None]
    entropy = -(p * log_p).sum(-1)
    return Fidelity(
        entries=float(used.sum(-1).double().mean()),
        missing_mass=float(missing.mean()),
        excess_kl=float(excess.mean()),
        uniform_kl=float((-entropy - torch.xlogy(p, q).sum(-1)).mean()),
        squared_error=float((q - p).square().sum(-1).mean()),
        teacher_entropy=float(entropy.mean()),
    )


class Scores(Protocol):
    """The likeliest ids at N positions, as a server returns them."""

    @property
    def counts(self) -> NDArray[np.int64]:
        """[N] ids of each."""

    @property
    def ids(self) -> NDArray[np.int64]:
        """[Σ counts] the likeliest first."""

    @property
    def log_probs(self) -> NDArray[np.float64]:
        """[Σ counts] over the whole vocabulary."""

    @property
    def actual(self) -> NDArray[np.float64]:
        """[N] of the token that stands there."""


def chosen_of(scores: Scores, settings: CacheSettings) -> Chosen:
    """What is stored of a server's log-probabilities: the fewest ids that reach `top_p`.

    What is left is one outcome; nothing is normalised again. `k_max` is how many were asked for.
    """
    p, counts = np.exp(scores.log_probs), scores.counts
    starts = np.repeat(np.cumsum(counts) - counts, counts)
    reached = np.concatenate([[0.0], np.cumsum(p)])
    kept = reached[:-1] - reached[starts] < settings.top_p
    kept |= np.arange(len(p)) == starts
    token = np.repeat(np.arange(len(counts)), counts)
    heads, nothing = np.bincount(token[kept], minlength=len(counts)), np.zeros(len(counts))
    return Chosen(
        heads=heads,
        head_ids=scores.ids[kept],
        head_probabilities=p[kept],
        samples=np.zeros(len(heads), np.int64),
        sample_ids=np.zeros(0, np.int64),
        tail=np.maximum(1.0 - np.bincount(token[kept], p[kept], len(counts)), 0.0),
        tail_entropy=nothing,
        pooled=nothing,
    )


def token_counts(rows: Sequence[Row], size: int, pooled: float) -> TokenStats:
    """Order ids by how often they are learnt, where no model is at hand to measure them."""
    counts = np.zeros(size)
    for row in rows:
        ids = np.asarray(row.input_ids)[np.asarray(row.supervised, np.bool_)]
        counts += np.bincount(ids, minlength=size)
    return TokenStats(np.argsort(-counts, kind="stable"), np.zeros(size, np.float32), pooled)


@torch.no_grad()
def distance(model: Any, row: Row, scores: Scores, vocabulary: int) -> dict[str, float]:
    """Compare what a server says of a conversation with a model.

    Args:
        model: of the same weights.
        row: the conversation, every token supervised.
        scores: of every position but the first.
        vocabulary: ids there are.

    Returns:
        `kl`, of the scores to the model with the tail as one outcome, and `difference_mean`, of
        the tokens' own log-probabilities; in nats a token.
    """
    batch = collate([(0, row)], padding=padding_for(model)).to(model.device)
    tiles = tiles_of_logits(model, batch, vocabulary, 1.0)
    log_p = torch.cat([tile.double().log_softmax(-1).cpu() for tile in tiles]).numpy()
    ids, positions = np.asarray(row.input_ids)[1:], np.arange(len(log_p))
    token = np.repeat(positions, scores.counts)
    here, there = log_p[token, scores.ids], scores.log_probs
    left = [
        np.maximum(1 - np.bincount(token, np.exp(each), len(log_p)), 1e-12)
        for each in (there, here)
    ]
    kl = np.bincount(token, np.exp(there) * (there - here), len(log_p))
    kl = kl + left[0] * np.log(left[0] / left[1])
    own = np.abs(log_p[positions, ids] - scores.actual)
    return {"kl": round(float(kl.mean()), 6), "difference_mean": round(float(own.mean()), 6)}
