"""Reads the conversations of a source from JSON, CSV or Parquet files, or from the hub."""

from __future__ import annotations

import csv
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dominie.core.errors import InputError, unreadable
from dominie.data.columns import refuse_rejected
from dominie.data.ecommerce_formats import with_meta_file
from dominie.data.formats import SHAREGPT_ROLES, Conversation, parsed_row
from dominie.data.json_files import MAX_ROW_BYTES, json_rows, jsonl_rows, without_nulls

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from dominie.data.sources import Source

__all__ = ["Conversation", "read_conversations"]

FAULTS_SHOWN = 5
"""So many bad rows are named at once, so that a file need not be corrected one run at a time."""
#: Stands for an answer that is not there while a row is read.
_ANSWER = "."
_BATCH_ROWS = 512
_FEW_VALUES, _FEW_BYTES = 2**22, 2**28  # of a Parquet file, which may be as small as it likes


def read_conversations(source: Source) -> Iterator[Conversation]:
    """The conversations of a source in order, streamed: a file is never held in memory.

    Raises:
        InputError: at the first row that cannot be read, naming also the bad rows that follow it
            up to `FAULTS_SHOWN`; or for a file that cannot be read at all.
    """
    results = _results(source)
    for result in results:
        if isinstance(result, InputError):
            raise _with_further_faults(result, results)
        yield result


def _results(source: Source) -> Iterator[Conversation | InputError]:
    parse = parsed_prompt if source.prompts else parsed_row
    for where, row in raw_rows(source):
        try:
            if isinstance(row, InputError):
                raise row
            conversation = parse(row, where)
            if any(conversation.fields.get(k) != v for k, v in (source.where or {}).items()):
                continue
            refuse_rejected(conversation.fields, where)
        except InputError as error:
            yield error
            continue
        yield conversation


def _with_further_faults(
    first: InputError, rest: Iterator[Conversation | InputError]
) -> InputError:
    """The first fault, with the places of those that follow."""
    further: list[InputError] = []
    try:
        faults = (result for result in rest if isinstance(result, InputError))
        further.extend(islice(faults, FAULTS_SHOWN))
    except InputError as error:
        further.append(error)
    if not further:
        return first
    shown = further[: FAULTS_SHOWN - 1]
    if all(error.what == first.what for error in shown):  # a file of another layout, mostly
        also = f"the same in {', '.join(Path(str(error.where)).name for error in shown)}"
    else:
        also = "also at fault: " + "; ".join(f"{error.where} ({error.what})" for error in shown)
    more = ", and more" if len(further) == FAULTS_SHOWN else ""
    return InputError(
        first.what,
        where=first.where,
        expected=first.expected,
        found=first.found,
        do=f"{first.do or 'correct this row'}; {also}{more}",
    )


def raw_rows(source: Source) -> Iterator[tuple[str, Any | InputError]]:
    """Every row of a source as (where, value), in order; a row that cannot be read is its error.

    Raises:
        InputError: a file that is missing, empty, unreadable or of a format that cannot be read,
            or a hub data set that cannot be reached.
    """
    if not source.is_local:
        yield from _hub_rows(source)
        return
    for path in source.local_files():
        count = 0
        try:
            for where, row in with_meta_file(path, _file_rows(path)):
                count += 1
                yield where, row
        except OSError as error:
            raise unreadable(path, error) from error
        if not count:
            raise InputError(
                "the file is empty",
                where=str(path),
                expected="at least one conversation",
                found="no row" if path.stat().st_size else "0 bytes",
            )


def _file_rows(path: Path) -> Iterator[tuple[str, Any | InputError]]:
    if path.suffix.lower() == ".parquet":
        for number, columns in _parquet_rows(path):
            yield f"{path}, row {number}", columns
    elif path.suffix.lower() == ".csv":
        yield from _csv_rows(path)
    else:
        read = jsonl_rows if path.suffix.lower() == ".jsonl" else json_rows
        for number, row in read(path):
            yield f"{path}:{number}", row


def _csv_rows(path: Path) -> Iterator[tuple[str, Any | InputError]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader: Any = csv.DictReader(file, strict=True)
        try:
            _refuse_columns_twice(reader.fieldnames or (), str(path))
            for row in reader:
                where = f"{path}:{reader.line_num}"
                if None in row or None in row.values():
                    row = InputError(
                        "the row has another number of columns than the first line names",
                        where=where,
                        expected=f"columns {', '.join(reader.fieldnames or ())}",
                    )
                yield where, row
        except (csv.Error, UnicodeDecodeError) as error:
            where = f"{path}:{reader.line_num + 1}"
            yield where, InputError("malformed CSV", where=where, found=str(error))


def _refuse_columns_twice(names: Sequence[str], where: str) -> None:
    """Refuse a table two columns of which have one name: the last would win without a word."""
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise InputError(
            "two columns have the same name",
            where=where,
            expected="each name once",
            found=f"{twice!r} {names.count(twice)} times",
            do="rename or remove one of the two",
        )


def _parquet_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(path) as file:
            _refuse_fields_twice(file.schema_arrow, str(path))
            footer = file.metadata
            _refuse_unfolding(footer, path)
            columns = [file.schema.column(i) for i in range(len(file.schema))]
        texts = [
            column.path
            for column in columns
            if column.physical_type == "BYTE_ARRAY"
            and column.logical_type.type in ("STRING", "JSON", "NONE")
        ]
        with pq.ParquetFile(
            path, metadata=footer, read_dictionary=texts, memory_map=True, pre_buffer=False
        ) as file:
            batches = file.iter_batches(batch_size=_BATCH_ROWS)
            rows = chain.from_iterable(_plain_rows(batch, path) for batch in batches)
            for number, row in enumerate(rows, 1):
                yield number, without_nulls(row)
    except (pa.ArrowException, ValueError, OverflowError) as error:
        raise InputError(
            "this is not a Parquet file that can be read",
            where=f"{path}, row {number + 1}" if number else str(path),
            expected="a complete Parquet file",
            found=str(error).partition("\n")[0],
        ) from error


def _refuse_unfolding(footer: Any, path: Path) -> None:
    """Refuse a small file that claims to hold what would fill the memory or take for ever."""
    size = path.stat().st_size
    most = max(_FEW_VALUES, 64 * size)
    chunks = [
        footer.row_group(g).column(c)
        for g in range(footer.num_row_groups)
        for c in range(footer.num_columns)
    ]
    values = max([footer.num_rows, *(chunk.num_values for chunk in chunks)])
    unpacked = max((chunk.total_uncompressed_size for chunk in chunks), default=0)
    most_bytes = max(_FEW_BYTES, 200 * size)
    if values > most or unpacked > most_bytes:
        raise InputError(
            "the Parquet file claims more than a file of its size can hold of conversations",
            where=str(path),
            expected=f"at most {most:,} values in a column, and {most_bytes:,} bytes of them",
            found=f"{values:,} values, {unpacked:,} bytes unpacked, in a file of {size:,} bytes",
            do="check where the file comes from; repeated rows are trained on once in any case",
        )


def _plain_rows(batch: Any, path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a record batch, a few at a time where they are large.

    Texts that stand often in a file are one text in the batch, and only as many as fit in
    `MAX_ROW_BYTES` are copied at once.
    """
    size = sum(map(_text_bytes, batch.columns))
    if size <= MAX_ROW_BYTES:
        yield from batch.to_pylist()
        return
    if len(batch) == 1:
        raise InputError(
            "a row is too large",
            where=str(path),
            expected=f"at most {MAX_ROW_BYTES >> 20} MiB a row",
            found=f"{size >> 20:,} MiB",
            do="check that this is a data file",
        )
    half = len(batch) // 2
    yield from _plain_rows(batch.slice(0, half), path)
    yield from _plain_rows(batch.slice(half), path)


def _text_bytes(array: Any) -> int:
    """Bytes of all texts in an array, each as often as it stands there."""
    import pyarrow as pa
    import pyarrow.compute as pc

    kind = array.type
    if pa.types.is_dictionary(kind):
        lengths = pc.binary_length(array.dictionary)
        return pc.sum(lengths.take(array.indices.drop_null())).as_py() or 0
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_struct(kind):
        parts = array.flatten()
        return sum(map(_text_bytes, parts if isinstance(parts, list) else [parts]))
    return int(array.nbytes)


def _refuse_fields_twice(fields: Any, where: str) -> None:
    """`_refuse_columns_twice` for an Arrow schema, and for objects in its columns."""
    import pyarrow as pa

    _refuse_columns_twice([each.name for each in fields], where)
    for each in fields:
        kind = each.type
        while pa.types.is_list(kind) or pa.types.is_large_list(kind):
            kind = kind.value_type
        if pa.types.is_struct(kind):
            _refuse_fields_twice(list(kind), where)


def _hub_rows(source: Source) -> Iterator[tuple[str, Any]]:
    import datasets

    number = 0
    try:
        rows = datasets.load_dataset(source.path, source.subset, split=source.split, streaming=True)
        for number, row in enumerate(rows, 1):
            yield f"{source.path}[{source.split}], row {number}", without_nulls(row)
    # The hub client, its file systems and the loaders raise whatever they please.
    except Exception as error:
        raise source.unreachable(error) from error
    if not number:
        raise InputError(
            "the hub data set is empty",
            where=f"source {source.name}, path {source.path}",
            expected="at least one conversation",
        )


def parsed_prompt(row: Any, where: str) -> Conversation:
    """The conversation in a row up to its last answer, which need not be there.

    Args:
        row: the decoded row, of any known format.
        where: the file and line, for messages.

    Raises:
        InputError: as `parsed_row`, or nobody asks anything.
    """
    added = _answer(row) if isinstance(row, dict) else {}
    conversation = parsed_row(row | added if added else row, where)
    asked = conversation.messages[: conversation.last_answer]
    if not any(message["role"] in ("user", "tool") for message in asked):
        raise InputError(
            "the row has no prompt",
            where=where,
            expected="a message of the user, or a tool's result, to answer",
            found=f"roles {', '.join(m['role'] for m in asked) or 'none'} before the answer",
            do="remove the row, or the key `prompts` of its source",
        )
    unread = conversation.unread if added else (*conversation.unread, "the last answer")
    return replace(conversation, messages=asked, weights=(), unread=unread, prompt=True)


def _answer(row: Mapping[str, Any]) -> dict[str, Any]:
    """The columns that give a row an answer if it has none; nothing if it has one."""
    for column in ("messages", "conversations"):
        turns = row.get(column)
        if isinstance(turns, list) and turns and isinstance(turns[-1], dict):
            role, content = ("role", "content") if "role" in turns[-1] else ("from", "value")
            if SHAREGPT_ROLES.get(str(turns[-1].get(role))) == "assistant":
                return {}
            return {column: [*turns, {role: "assistant", content: _ANSWER}]}
    for question, answer_column in (("prompt", "completion"), ("instruction", "output")):
        if question in row and row.get(answer_column) is None:
            return {answer_column: _ANSWER}
    return {}
