"""What a model says about conversations, as the rows of a cache."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from dominie.data.batches import Batch, Row, collate
from dominie.data.shards import Entry
from dominie.losses.tiles import sum_precision
from dominie.models.head import decoder, output_head
from dominie.teachers.cached import key_of_row
from dominie.teachers.coding import Coder
from dominie.teachers.schemes import CacheSettings, choose, joined
from dominie.teachers.vocabulary import Vocabulary

if TYPE_CHECKING:
    from torch import Tensor

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
    vocabulary: Vocabulary,
    settings: CacheSettings,
    *,
    temperature: float,
) -> list[Entry]:
    """The rows of a cache for one batch of conversations, in their order.

    Only supervised positions meet the head, a tile of them at a time.

    Args:
        model: the teacher.
        rows: conversations with at least one supervised token each.
        vocabulary: of the cache.
        settings: what is stored.
        temperature: of the softmax.
    """
    coder, keys = Coder.of(vocabulary, settings), [key_of_row(row) for row in rows]
    pooled = vocabulary.is_pooled if settings.scheme == "threshold" else None
    pool = None if pooled is None else torch.from_numpy(pooled).to(model.device)
    batch = collate([(0, row) for row in rows]).to(model.device)
    sizes = batch.supervised.sum(-1).cpu().numpy()
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
        for block in torch.split(logits, _block_rows(logits)):
            stop = start + len(block)
            parts.append(choose(block, settings, draws[start:stop].to(block.dtype), pool))
            start = stop
    chosen = joined(parts).split(sizes)
    return [
        Entry(key, len(said), coder.encoded(said, key))
        for key, said in zip(keys, chosen, strict=True)
    ]


def _block_rows(logits: Tensor) -> int:
    """Of so few tokens that on a CPU the passes over them find them in cache."""
    if logits.device.type != "cpu":
        return max(1, len(logits))
    return max(1, _CPU_BLOCK_ELEMENTS // logits.shape[1])


def tiles_of_logits(
    model: Any, batch: Batch, vocabulary: int, temperature: float
) -> Iterator[Tensor]:
    """[n, V] logits of the supervised positions over the temperature, a tile after the other.

    Every tile is written into the same memory. Ids from `vocabulary` on are padding of the head
    and are left out.
    """
    hidden = decoder(model)(**batch.model_inputs()).last_hidden_state[batch.supervised]
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
def measured_vocabulary(
    model: Any, rows: Sequence[Row], size: int, settings: CacheSettings, *, temperature: float
) -> Vocabulary:
    """Mean probabilities over some 4,096 tokens of these rows."""
    total, tails = (torch.zeros(size, dtype=torch.float64) for _ in range(2))
    seen = 0
    for batch in in_batches(rows, range(min(len(rows), 64)), batch_tokens(model)):
        for logits in tiles_of_logits(
            model, collate([(0, row) for row in batch]).to(model.device), size, temperature
        ):
            p = logits.softmax(-1)
            total += p.sum(0).double().cpu()
            tails += p.masked_fill_(p >= settings.threshold, 0.0).sum(0).double().cpu()
            seen += len(logits)
        if seen >= _CALIBRATION_TOKENS:
            break
    ids = total.argsort(descending=True, stable=True).numpy()
    return Vocabulary(ids, (tails / max(seen, 1)).float().numpy(), settings.pooled)


def _generator(key: bytes) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64([zlib.crc32(key), *key]))
