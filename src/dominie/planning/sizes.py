"""How many conversations a stage reads and how long they are, from the data or from assumptions."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from dominie.data.conversations import read_conversations
from dominie.data.mixing import total_conversations
from dominie.data.sources import Source
from dominie.recipe import Recipe, Stage
from dominie.toyworld import is_toyworld, materialise

#: Characters of a token, where there is no tokenizer at hand: about those of English text.
CHARACTERS_PER_TOKEN = 4
#: Tokens that a chat template adds to a turn.
_TEMPLATE_TOKENS = 6
#: Conversations whose length is looked at.
_LOOKED_AT = 1000


@dataclass(frozen=True)
class Size:
    """Of a source: conversations to train on, their lengths in tokens, and where that is from."""

    conversations: int
    mean: float
    longest: float
    known: bool


def source_sizes(
    recipe: Recipe, *, conversations: int | None, tokens: float | None
) -> dict[str, Size]:
    """The size of every source of a recipe.

    Args:
        recipe: the recipe.
        conversations: of each source whose data are not here; None assumes 100,000.
        tokens: of a conversation; None is read from the data, or the most there can be.
    """
    return {
        name: _size(source, recipe, conversations, tokens) for name, source in recipe.data.items()
    }


def _size(source: Source, recipe: Recipe, conversations: int | None, tokens: float | None) -> Size:
    trained = 1 - source.held_out_fraction
    if conversations is None or tokens is None:
        with tempfile.TemporaryDirectory() as scratch:
            lengths, found = _looked_at(source, Path(scratch), recipe.train.seed)
        if lengths:
            mean = tokens or sum(lengths) / len(lengths)
            count = conversations or found
            return Size(max(1, round(count * trained)), mean, tokens or max(lengths), True)
    count = conversations or 100_000
    unbounded = float("inf")
    return Size(max(1, round(count * trained)), tokens or unbounded, unbounded, False)


def _looked_at(source: Source, scratch: Path, seed: int) -> tuple[list[float], int]:
    """Estimated tokens of the first conversations, and how many there are in all."""
    words = is_toyworld(source.path)
    if words:
        source = replace(source, path=str(materialise(source.path, scratch, seed=seed)))
    if not Path(source.path).expanduser().exists():
        return [], 0
    lengths: list[float] = []
    for conversation in islice(read_conversations(source), _LOOKED_AT):
        texts = [str(message["content"] or "") for message in conversation.messages]
        counted = sum(len(t.split()) if words else len(t) / CHARACTERS_PER_TOKEN for t in texts)
        lengths.append(counted + _TEMPLATE_TOKENS * len(texts))
    if len(lengths) < _LOOKED_AT:
        return lengths, len(lengths)
    return lengths, max(len(lengths), sum(map(_rows, source.local_files())))


def _rows(path: Path) -> int:
    """Rows of a file: its line ends, or what the footer of a Parquet file says."""
    if path.suffix == ".parquet":
        import pyarrow.parquet

        return int(pyarrow.parquet.ParquetFile(path).metadata.num_rows)
    with path.open("rb") as file:
        return sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b""))


@dataclass(frozen=True)
class Work:
    """What a stage runs through.

    Attributes:
        steps: of the optimiser.
        conversations: in all of them.
        tokens: in all of them.
        rows: of the largest micro-batch.
        length: tokens of a row of it.
        known: whether the data were looked at.
    """

    steps: int
    conversations: int
    tokens: float
    rows: int
    length: int
    known: bool


def work_of(stage: Stage, sizes: Mapping[str, Size], micro_batch: int) -> Work:
    """The steps of a stage, and the largest batch that its data can make.

    Args:
        stage: the stage.
        sizes: of the recipe's sources.
        micro_batch: conversations of a forward pass.
    """
    train = stage.train
    shares = {name: stage.data[name].share for name in stage.active}
    whole = sum(shares.values())
    counts = {name: sizes[name].conversations for name in shares}
    steps = train.steps or max(
        1, round(total_conversations(counts, shares, train.epochs) / train.batch)
    )
    limit = train.max_length
    mean = sum(min(sizes[n].mean, limit) * share / whole for n, share in shares.items())
    longest = min(max(sizes[name].longest for name in shares), limit)
    rows, length = micro_batch, longest
    if train.packing:  # several to a row: the fewer, fuller rows of what would be padded
        rows = max(1, min(micro_batch, -(-int(micro_batch * longest) // limit)))
        length = min(limit, micro_batch * longest)
    return Work(
        steps=steps,
        conversations=steps * train.batch,
        tokens=steps * train.batch * mean,
        rows=rows,
        length=max(2, round(length)),
        known=all(sizes[name].known for name in shares),
    )
