"""Rows in checksummed shards: killed writers, two writers, flipped bits."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import pyarrow as pa
import pytest

from dominie.core.errors import InputError, RunError
from dominie.data.shards import (
    Entry,
    Shards,
    ShardWriter,
    damaged_shards,
    recover_unfinished,
    shard_files,
)

REMEDY = "make it again"


def entry(number: int) -> Entry:
    key = hashlib.blake2b(str(number).encode(), digest_size=16).digest()
    return Entry(key, number % 7, bytes([number % 256]) * (number % 50))


def write(folder: Path, numbers: range, **options: int) -> None:
    with ShardWriter(folder, **options) as writer:
        for start in range(numbers.start, numbers.stop, 10):
            writer.add([entry(i) for i in range(start, min(start + 10, numbers.stop))])


def always(_: Entry) -> bool:
    return True


def test_rows_are_found_by_key_in_any_shard(tmp_path):
    write(tmp_path, range(200), shard_bytes=1000)
    assert len(shard_files(tmp_path)) > 2
    shards = Shards(tmp_path, remedy=REMEDY)
    assert len(shards) == 200
    for number in range(200):
        assert shards.get(entry(number).key) == entry(number)
    assert entry(200).key not in shards
    assert shards.get(entry(200).key) is None
    assert shards.tokens == sum(entry(i).tokens for i in range(200))
    assert shards.code_bytes == sum(len(entry(i).code) for i in range(200))


def test_an_empty_folder_has_no_rows(tmp_path):
    assert len(Shards(tmp_path, remedy=REMEDY)) == 0
    assert entry(0).key not in Shards(tmp_path, remedy=REMEDY)
    with ShardWriter(tmp_path) as writer:
        writer.add([])
    assert shard_files(tmp_path) == []


def test_arrow_and_datasets_open_a_shard(tmp_path):
    write(tmp_path / "cache", range(30))
    (path,) = shard_files(tmp_path / "cache")
    with pa.memory_map(str(path)) as file:
        table = pa.ipc.open_stream(file).read_all()
    assert table.column_names == ["key", "tokens", "code"]
    opened = datasets.Dataset.from_file(str(path))
    assert opened[3]["code"] == entry(3).code


def test_a_flipped_bit_anywhere_is_found_and_named(tmp_path):
    write(tmp_path, range(40))
    (path,) = shard_files(tmp_path)
    whole = path.read_bytes()
    for place in range(0, len(whole), max(1, len(whole) // 97)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        with pytest.raises(InputError, match=path.name) as refused:
            Shards(tmp_path, remedy=REMEDY)
        assert refused.value.do == REMEDY
    for cut in (0, 1, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        assert damaged_shards(tmp_path) == [path]
    path.write_bytes(whole)
    assert damaged_shards(tmp_path) == []


def test_a_shard_of_other_columns_is_refused(tmp_path):
    schema = pa.schema([("text", pa.string())])
    with pa.OSFile(str(tmp_path / "made"), "wb") as sink, pa.ipc.new_stream(sink, schema) as out:
        out.write_batch(pa.RecordBatch.from_arrays([pa.array(["a"])], schema=schema))
    name = hashlib.blake2b((tmp_path / "made").read_bytes(), digest_size=16).hexdigest()
    (tmp_path / "made").rename(tmp_path / f"shard-{name}.arrow")
    with pytest.raises(InputError, match="not a shard"):
        Shards(tmp_path, remedy=REMEDY)


WRITER = """
import sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_shards import ShardWriter, entry
start, stop, pause = int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
with ShardWriter(Path(sys.argv[1]), shard_bytes=2000) as writer:
    for number in range(start, stop):
        writer.add([entry(number)])
        print(number, flush=True)
        time.sleep(pause)
"""


def writing(folder: Path, start: int, stop: int, pause: float = 0.0) -> subprocess.Popen[str]:
    code = WRITER.format(tests=str(Path(__file__).parent))
    command = [sys.executable, "-c", code, str(folder), str(start), str(stop), str(pause)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ)


def test_a_killed_writer_loses_the_row_in_flight_at_most(tmp_path):
    writer = writing(tmp_path, 0, 10**6, 0.001)
    assert writer.stdout is not None
    last = 0
    while last < 120:
        last = int(writer.stdout.readline())
    writer.send_signal(signal.SIGKILL)
    printed = [last, *map(int, writer.stdout.read().split())]
    writer.wait()
    assert recover_unfinished(tmp_path, is_intact=always) > 0
    shards = Shards(tmp_path, remedy=REMEDY)
    for number in range(printed[-1] + 1):
        assert shards.get(entry(number).key) == entry(number)
    assert len(shards) <= printed[-1] + 2
    assert recover_unfinished(tmp_path, is_intact=always) == 0
    assert not list(tmp_path.glob(".writing-*"))


def test_what_a_living_writer_holds_is_left_to_it(tmp_path):
    with ShardWriter(tmp_path) as writer:
        writer.add([entry(1)])
        assert recover_unfinished(tmp_path, is_intact=always) == 0
    assert Shards(tmp_path, remedy=REMEDY).get(entry(1).key) == entry(1)


def test_two_processes_write_one_folder(tmp_path):
    writers = [writing(tmp_path, 0, 150), writing(tmp_path, 100, 260)]
    for writer in writers:
        writer.communicate(timeout=60)
        assert writer.returncode == 0
    shards = Shards(tmp_path, remedy=REMEDY)
    for number in range(260):
        assert shards.get(entry(number).key) == entry(number)


def test_only_whole_rows_are_taken_over(tmp_path):
    with ShardWriter(tmp_path) as writer:
        writer.add([entry(1), entry(2)])
        writer.add([entry(3)])
        (scratch,) = tmp_path.glob(".writing-*")
        half = scratch.read_bytes()
    for path in shard_files(tmp_path):
        path.unlink()
    (tmp_path / ".writing-gone").write_bytes(half[:-20])
    assert recover_unfinished(tmp_path, is_intact=lambda row: row.key != entry(2).key) == 1
    assert len(Shards(tmp_path, remedy=REMEDY)) == 1


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot be written"):
        ShardWriter(tmp_path / "file")


def test_opening_is_quick(tmp_path):
    write(tmp_path, range(20_000))
    started = time.monotonic()
    shards = Shards(tmp_path, remedy=REMEDY)
    assert time.monotonic() - started < 5  # 0.2 s on an idle machine
    assert shards.get(entry(19_999).key) == entry(19_999)
