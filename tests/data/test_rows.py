import json
import os
import tracemalloc

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dominie.core.errors import InputError, RunError
from dominie.data import rows as module
from dominie.data.conversations import read_conversations
from dominie.data.rows import Summary, prepare
from dominie.data.sources import Source, prompt_digest, read_split, split_of_prompt
from dominie.data.tokenization import encode


@pytest.fixture
def tokenizer(make_tokenizer):
    return make_tokenizer("chatml")


def qa(number, answer="four"):
    return {"prompt": f"question {number}", "completion": answer}


def source_of(folder, rows, name="general", **options):
    path = folder / f"{name}.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return Source(name=name, path=str(path), **options)


def prepared(tmp_path, tokenizer, *sources, max_length=64, **options):
    return prepare(
        {source.name: source for source in sources},
        tokenizer,
        max_length=max_length,
        cache=tmp_path / "cache",
        **options,
    )


def test_rows_are_the_encoded_conversations_of_each_split(tmp_path, tokenizer):
    source = source_of(
        tmp_path, [qa(i) for i in range(60)], validation_fraction=0.2, test_fraction=0.2
    )
    made = prepared(tmp_path, tokenizer, source)["general"]
    for split in ("train", "validation", "test"):
        expected = [encode(tokenizer, c) for c in read_split(source, split)]
        found = [(r.input_ids.tolist(), r.supervised.tolist()) for r in getattr(made, split)]
        assert found == [e[:2] for e in expected]
        assert found
    assert made.summary == Summary(60, 0, 0, 0, 0, 60)


def test_duplicates_are_removed_and_counted(tmp_path, tokenizer):
    source = source_of(tmp_path, [qa(1), qa(2), qa(1), qa(1, "five")])
    made = prepared(tmp_path, tokenizer, source)["general"]
    assert made.summary == Summary(4, 1, 0, 0, 0, 3)
    assert len(made.train) == 3


def test_what_one_source_holds_out_no_other_teaches(tmp_path, tokenizer):
    rows = [qa(i) for i in range(60)]
    exam = source_of(tmp_path, rows, "exam", test_fraction=0.3, validation_fraction=0.1)
    chats = source_of(tmp_path, [qa(i, "another") for i in range(30, 90)], "chats")
    made = prepared(tmp_path, tokenizer, exam, chats)
    held_out = {
        prompt_digest(c)
        for c in read_conversations(exam)
        if split_of_prompt(prompt_digest(c), exam) != "train"
    }
    taught = {prompt_digest(c) for c in read_conversations(chats)} - held_out
    assert made["chats"].summary.removed_held_out == 60 - len(taught) > 0
    assert len(made["chats"].train) == len(taught)
    assert made["exam"].summary.removed_held_out == 0


@pytest.mark.parametrize(
    ("too_long", "summary"), [("truncate", (3, 0, 0, 1, 1, 2)), ("drop", (3, 0, 0, 0, 2, 1))]
)
def test_what_is_too_long_is_cut_or_dropped_and_counted(tmp_path, tokenizer, too_long, summary):
    rows = [qa(1), qa(2, "four " * 100), {"prompt": "two " * 100, "completion": "four"}]
    source = source_of(tmp_path, rows, too_long=too_long)
    made = prepared(tmp_path, tokenizer, source, max_length=40)["general"]
    assert made.summary == Summary(*summary)
    if too_long == "truncate":
        whole = encode(tokenizer, list(read_conversations(source))[1])
        assert made.train[1].input_ids.tolist() == whole.input_ids[:40]
        assert made.train[1].supervised.tolist() == whole.supervised[:40]
    else:
        assert made.train.lengths.max() < 40


CONTENT = st.sampled_from(["a", "b", "c", "four " * 12, "two " * 30])


@settings(max_examples=25, deadline=None)
@given(
    first=st.lists(st.tuples(CONTENT, CONTENT), min_size=1, max_size=12),
    second=st.lists(st.tuples(CONTENT, CONTENT), min_size=1, max_size=12),
    fraction=st.sampled_from([0.0, 0.4, 0.8]),
    too_long=st.sampled_from(["truncate", "drop"]),
)
def test_every_conversation_is_accounted_for(
    tmp_path_factory, make_tokenizer, first, second, fraction, too_long
):
    folder = tmp_path_factory.mktemp("rows")
    sources = [
        source_of(
            folder,
            [{"prompt": p, "completion": a} for p, a in rows],
            name,
            test_fraction=fraction * scale,
            too_long=too_long,
        )
        for name, rows, scale in (("one", first, 1), ("two", second, 0.5))
    ]
    try:
        made = prepared(folder, make_tokenizer("chatml"), *sources, max_length=30)
    except InputError as error:
        assert error.what == "nothing is left to train on"  # noqa: PT017
        return
    for name, rows in (("one", first), ("two", second)):
        s = made[name].summary
        assert s.read == len(rows)
        assert s.read == s.removed_duplicates + s.removed_held_out + s.too_long + s.kept
        assert s.kept == len(made[name].train) + len(made[name].validation) + len(made[name].test)
        assert s.truncated <= s.kept
        assert all(row.supervised[1:].any() for row in made[name].train)
        assert all(len(row.input_ids) <= 30 for row in made[name].train)


def test_the_summary_is_one_line():
    line = Summary(1200, 3, 4, 5, 6, 1187).line("general")
    assert line == (
        "general: read 1,200, removed 7 (3 duplicates, 4 held out), "
        "truncated 5, too long 6, kept 1,187"
    )


# The cache


@pytest.fixture
def encodings(monkeypatch):
    """How many conversations were encoded."""
    seen = []

    def counting(tokenizer, batches, **options):
        for batch in encode_batches(tokenizer, batches, **options):
            seen.extend(batch)
            yield batch

    encode_batches = module.encode_batches
    monkeypatch.setattr(module, "encode_batches", counting)
    return seen


def test_rows_are_found_again_by_content(tmp_path, tokenizer, encodings):
    rows = [qa(i) for i in range(20)]
    source = source_of(tmp_path, rows, test_fraction=0.3)
    first = prepared(tmp_path, tokenizer, source)["general"]
    assert len(encodings) == 20
    moved = source_of(tmp_path, rows, "renamed", test_fraction=0.3)
    second = prepared(tmp_path, tokenizer, moved)["renamed"]
    assert len(encodings) == 20
    assert second.summary == first.summary
    assert second.train.digest == first.train.digest


def test_a_second_time_nothing_is_even_parsed(tmp_path, tokenizer, monkeypatch):
    source = source_of(tmp_path, [qa(i) for i in range(20)], test_fraction=0.3)
    prepared(tmp_path, tokenizer, source)
    monkeypatch.setattr(module, "read_conversations", None)
    monkeypatch.setattr(module, "held_out_prompts", None)
    assert len(prepared(tmp_path, tokenizer, source)["general"].train)


def test_what_changes_the_rows_makes_them_anew(tmp_path, tokenizer, make_tokenizer, encodings):
    rows = [qa(i) for i in range(20)]

    def encoded(*sources, tokenizer=tokenizer, **options):
        encodings.clear()
        prepared(tmp_path, tokenizer, *sources, **options)
        return len(encodings)

    source = source_of(tmp_path, rows)
    assert encoded(source) == 20
    assert encoded(source) == 0
    assert encoded(source, max_length=63) == 20
    assert encoded(Source(name="general", path=source.path, too_long="drop")) == 20
    assert encoded(Source(name="general", path=source.path, validation_fraction=0.1)) == 20
    assert encoded(source, tokenizer=make_tokenizer("llama3")) == 20
    exam = source_of(tmp_path, rows[:10], "exam", test_fraction=0.5)
    assert encoded(source, exam) > 10
    (tmp_path / "general.jsonl").write_text((tmp_path / "general.jsonl").read_text() + "\n")
    assert encoded(source) == 20


def test_an_edit_of_equal_size_and_time_is_seen(tmp_path, tokenizer):
    source = source_of(tmp_path, [qa(1), qa(2)])
    before = prepared(tmp_path, tokenizer, source)["general"].train.digest
    path = tmp_path / "general.jsonl"
    times = (path.stat().st_atime_ns, path.stat().st_mtime_ns)
    path.write_text(path.read_text().replace("question 2", "question 3"))
    os.utime(path, ns=times)
    assert prepared(tmp_path, tokenizer, source)["general"].train.digest != before


def test_an_interruption_leaves_nothing_half_made(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(module, "_BATCH_ROWS", 4)
    source = source_of(tmp_path, [qa(i) for i in range(20)])

    def interrupt(name, read):
        if read >= 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepared(tmp_path, tokenizer, source, progress=interrupt)
    assert list((tmp_path / "cache").iterdir()) == []
    assert len(prepared(tmp_path, tokenizer, source)["general"].train) == 20


def test_another_process_may_be_first(tmp_path, tokenizer):
    source = source_of(tmp_path, [qa(i) for i in range(20)])

    def race(name, read):
        prepared(tmp_path, tokenizer, source)

    made = prepared(tmp_path, tokenizer, source, progress=race)
    assert len(made["general"].train) == 20
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_a_cache_that_cannot_be_written_is_a_failed_run(tmp_path, tokenizer):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(RunError, match="cannot be written"):
        prepared(tmp_path, tokenizer, source_of(tmp_path, [qa(1)]))


def test_progress_is_told(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(module, "_BATCH_ROWS", 8)
    told = []
    source = source_of(tmp_path, [qa(i) for i in range(20)])
    prepared(tmp_path, tokenizer, source, progress=lambda name, read: told.append((name, read)))
    assert told == [("general", 8), ("general", 16), ("general", 20)]


def test_memory_does_not_grow_with_the_rows(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr("dominie.data.row_store._BATCH_TOKENS", 2**12)
    monkeypatch.setattr(module, "_BATCH_ROWS", 32)
    prepared(tmp_path, tokenizer, source_of(tmp_path, [qa(0)], "warm"))

    def peak(count):
        source = source_of(tmp_path, [qa(i, "four " * 40) for i in range(count)], f"n{count}")
        arrow = pa.total_allocated_bytes()
        tracemalloc.start()
        made = prepared(tmp_path, tokenizer, source, max_length=128, processes=1)
        grown = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert len(made[source.name].train) == count
        assert pa.total_allocated_bytes() - arrow < 2**20
        return grown

    # Of each conversation a digest stays, some 150 bytes; as Python objects it is 10 kB.
    assert peak(1000) - peak(200) < 800 * 600


# Faults


def test_nothing_left_says_why(tmp_path, tokenizer):
    repeated = [source_of(tmp_path, [qa(i) for i in range(9)], n) for n in ("exam", "chats")]
    exam = Source(name="exam", path=repeated[0].path, test_fraction=1.0)
    with pytest.raises(InputError, match="nothing is left to train on") as caught:
        prepared(tmp_path, tokenizer, exam, repeated[1])
    assert "9 held out" in caught.value.found
    assert "repeats what others hold out" in caught.value.do
    with pytest.raises(InputError, match="nothing is left to train on") as caught:
        prepared(tmp_path, tokenizer, repeated[1], max_length=4)
    assert "too long 9" in caught.value.found
    assert "max_length" in caught.value.do
    assert "general" not in str(caught.value)


def test_a_source_for_evaluation_alone_need_not_teach(tmp_path, tokenizer):
    source = source_of(tmp_path, [qa(i) for i in range(9)], test_fraction=1.0)
    made = prepared(tmp_path, tokenizer, source)["general"]
    assert (len(made.train), len(made.validation), len(made.test)) == (0, 0, 9)


def test_a_bad_row_stops_before_anything_is_made(tmp_path, tokenizer):
    source = source_of(tmp_path, [qa(1), {"prompt": "alone"}])
    with pytest.raises(InputError) as caught:
        prepared(tmp_path, tokenizer, source)
    assert caught.value.where == f"{source.path}:2"
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_row_that_the_template_refuses_is_named(tmp_path, make_tokenizer):
    rows = [qa(1), {"messages": [{"role": "system", "content": "x"}, *_messages()]}]
    source = source_of(tmp_path, rows)
    with pytest.raises(InputError, match="template fails") as caught:
        prepared(tmp_path, make_tokenizer("gemma"), source)
    assert caught.value.where == f"{source.path}:2"


def _messages():
    return [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


def test_a_length_of_nothing_is_refused(tmp_path, tokenizer):
    with pytest.raises(InputError, match="no token can be predicted"):
        prepared(tmp_path, tokenizer, source_of(tmp_path, [qa(1)]), max_length=1)


def test_a_missing_file_is_named(tmp_path, tokenizer):
    missing = Source(name="x", path=str(tmp_path / "missing.jsonl"))
    with pytest.raises(InputError, match="no such file"):
        prepared(tmp_path, tokenizer, missing)
