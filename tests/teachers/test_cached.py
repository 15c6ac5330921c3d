"""A cached teacher says what the live one does, wherever a conversation stands."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import tiny_model

from dominie.core.errors import InputError, RunError
from dominie.data.batch import collate
from dominie.data.shards import ShardWriter, shard_files
from dominie.data.tokenization import Encoded
from dominie.losses.forward_pass import ForwardPass
from dominie.losses.objective import Objective
from dominie.losses.targets import Signal
from dominie.losses.terms import LossTerms, Prediction
from dominie.models.head import decoder, output_head
from dominie.teachers import LocalTeacher, RoutedTeacher, TeacherPrefetch
from dominie.teachers.cache import MANIFEST, Cache, Identity, create
from dominie.teachers.cache_codec import Damaged
from dominie.teachers.cache_sampling import CacheSettings, TokenStats
from dominie.teachers.cache_writer import entries, in_batches, measure_token_stats
from dominie.teachers.cached import CachedTeacher, key_of_row

VOCABULARY = 31
EVERYTHING = CacheSettings(scheme="top", top_p=1.0, k_max=VOCABULARY, levels=10**9)


def model_of(seed: int, **options: Any) -> Any:
    model = tiny_model("mistral", seed=seed, vocab_size=VOCABULARY, dtype=torch.float64, **options)
    return model.eval().requires_grad_(False)


@pytest.fixture
def rows() -> list[Encoded]:
    generator = torch.Generator().manual_seed(0)
    return [
        Encoded(
            torch.randint(1, VOCABULARY, (length,), generator=generator).tolist(),
            [position >= 2 and position != 4 for position in range(length)],
        )
        for length in [5, 9, 3, 7, 6, 8, 9, 4]
    ]


def identity_of(settings: CacheSettings, **other: Any) -> Identity:
    known = {
        "teacher": "t",
        "revision": None,
        "weights": "w",
        "tokenizer": "k",
        "vocabulary": VOCABULARY,
        "temperature": 1.0,
        "scheme": settings.identity,
    }
    return Identity(**{**known, **other})


def cached(
    folder: Path,
    model: Any,
    rows: list[Encoded],
    settings: CacheSettings = EVERYTHING,
    t: float = 1.0,
) -> CachedTeacher:
    identity = identity_of(settings, temperature=t)
    create(
        folder, identity, measure_token_stats(model, rows, VOCABULARY, settings, temperature=t), {}
    )
    cache = Cache(folder, identity, remedy="run it again")
    with ShardWriter(folder, owner=cache.owner) as writer:
        for batch in in_batches(rows, range(len(rows)), 20):
            made = entries(
                model, batch, cache.vocabulary, settings, temperature=t, owner=cache.owner
            )
            writer.add(made)
    return CachedTeacher(cache)


def loss_and_gradient(
    teacher: Any,
    rows: list[tuple[int, Encoded]],
    t: float = 1.0,
    pack_to: int | None = None,
    **o: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    student = model_of(9)
    student.requires_grad_(True)
    batch = collate(rows, pack_to=pack_to, **o)
    objective = Objective([LossTerms(prediction=Prediction(temperature=t))] * 3)
    forward = ForwardPass(
        decoder(student)(**batch.model_inputs()).last_hidden_state,
        output_head(student),
        labels=batch.labels,
        source_ids=batch.source_ids,
        signal=teacher.signal(batch),
    )
    total = objective(forward).total
    total.backward()
    gradients = [p.grad.flatten() for p in student.parameters() if p.grad is not None]
    return total.detach(), torch.cat(gradients)


@pytest.mark.parametrize("t", [1.0, 2.5])
def test_everything_stored_gives_the_live_teachers_loss_and_gradient(tmp_path, rows, t):
    model = model_of(1)
    mixed = [(0, row) for row in rows]
    live = loss_and_gradient(LocalTeacher(model), mixed, t)
    stored = loss_and_gradient(cached(tmp_path, model, rows, t=t), mixed, t)
    torch.testing.assert_close(stored, live, rtol=2e-6, atol=2e-6)  # probabilities are float32


def test_quantised_levels_come_close(tmp_path, rows):
    model, mixed = model_of(1), [(0, row) for row in rows]
    settings = CacheSettings(scheme="top", top_p=1.0, k_max=VOCABULARY)
    live = loss_and_gradient(LocalTeacher(model), mixed)[1]
    stored = loss_and_gradient(cached(tmp_path, model, rows, settings), mixed)[1]
    assert (stored - live).norm() < 0.03 * live.norm()


def test_the_value_from_samples_is_that_of_the_teacher_on_average(tmp_path, rows):
    """Samples look surer than their teacher; its entropy, stored beside them, sets that right."""
    generator = torch.Generator().manual_seed(3)
    many = [
        Encoded(torch.randint(1, VOCABULARY, (40,), generator=generator).tolist(), [True] * 40)
        for _ in range(40)
    ]
    model, mixed = model_of(1), [(0, row) for row in many]
    settings = CacheSettings(scheme="sampled", samples=6)
    live = loss_and_gradient(LocalTeacher(model), mixed)[0]
    stored = loss_and_gradient(cached(tmp_path, model, many, settings), mixed)[0]
    assert float(stored) == pytest.approx(float(live), rel=0.03)


@pytest.mark.parametrize("t", [1.0, 2.0, 3.0])
def test_the_gradient_at_a_temperature_is_the_live_ones_on_average(tmp_path, t):
    """In float64, over many tokens; its noise stays within the bound that temperatures have."""
    generator = torch.Generator().manual_seed(4)
    many = [
        Encoded(torch.randint(1, VOCABULARY, (40,), generator=generator).tolist(), [True] * 40)
        for _ in range(30)
    ]
    mixed = [(0, row) for row in many]
    settings = CacheSettings(threshold=0.0066, pooled=0.0, levels=10**6)
    assert settings.most_temperature == pytest.approx(3.0, abs=0.02)
    live = loss_and_gradient(LocalTeacher(model_of(1)), mixed, t)
    stored = loss_and_gradient(cached(tmp_path, model_of(1), many, settings, t), mixed, t)
    assert float(stored[0]) == pytest.approx(float(live[0]), rel=0.02)
    assert (stored[1] - live[1]).norm() < 0.05 * live[1].norm()


def steps_from_itself(provider: Any, rows: list[Encoded], steps: int = 25) -> float:
    """KL from a teacher to a student that starts as it and takes Adam's steps of 1e-3."""
    teacher, student = model_of(1), model_of(1).requires_grad_(True)
    batch = collate([(0, row) for row in rows])
    optimiser = torch.optim.Adam(student.parameters(), lr=1e-3)
    objective = Objective([LossTerms(prediction=Prediction())])

    def loss(signal: Any) -> torch.Tensor:
        hidden = decoder(student)(**batch.model_inputs()).last_hidden_state
        forward = ForwardPass(
            hidden,
            output_head(student),
            labels=batch.labels,
            source_ids=batch.source_ids,
            signal=signal,
        )
        return objective(forward).total / batch.supervised.sum()

    for _ in range(steps):
        optimiser.zero_grad()
        loss(provider.signal(batch)).backward()
        optimiser.step()
    with torch.no_grad():
        return float(loss(LocalTeacher(teacher).signal(batch)))


class Rounded(LocalTeacher):
    """A live teacher whose hidden states come in bfloat16."""

    def signal(self, batch: Any) -> Any:
        (part,) = super().signal(batch).parts
        hidden = part.target.hidden.bfloat16().double()
        target = dataclasses.replace(part.target, hidden=hidden)
        return Signal((dataclasses.replace(part, target=target),))


def test_where_student_and_teacher_are_one_only_a_gradient_of_zero_stays(tmp_path, rows):
    """Adam makes a step of the learning rate of any gradient, however small: not the cache's noise
    but that there is some moves the student. A cache stays within a few times of what rounding a
    live teacher does, and finer ones are closer."""
    assert steps_from_itself(LocalTeacher(model_of(1)), rows) == pytest.approx(0, abs=1e-12)
    rounded = steps_from_itself(Rounded(model_of(1)), rows)
    exact = steps_from_itself(cached(tmp_path / "exact", model_of(1), rows), rows)
    assert exact > 0.1 * rounded > 1e-7
    settings = CacheSettings(threshold=0.0006, pooled=0.0)
    fine = steps_from_itself(cached(tmp_path / "fine", model_of(1), rows, settings), rows)
    default = steps_from_itself(
        cached(tmp_path / "default", model_of(1), rows, CacheSettings()), rows
    )
    assert max(exact, fine) < 4 * rounded
    assert default < 15 * rounded


@pytest.mark.parametrize("pack_to", [None, 24])
def test_order_mix_and_packing_do_not_matter(tmp_path, rows, pack_to):
    teacher = cached(tmp_path, model_of(1), rows, CacheSettings(threshold=0.2))
    one = loss_and_gradient(teacher, [(0, row) for row in rows])
    other = [(index % 2, rows[index]) for index in (6, 1, 7, 0, 3, 2, 5, 4)]
    again = loss_and_gradient(teacher, other, pack_to=pack_to, routes=[0, 0, 0])
    torch.testing.assert_close(again, one)


def test_a_cached_and_a_live_teacher_mix_by_source(tmp_path, rows):
    expert, reference = model_of(1), model_of(2)
    mixed = [(index % 2, row) for index, row in enumerate(rows)]
    of_expert = [row for source, row in mixed if source == 0]
    live = {"expert": LocalTeacher(expert), "reference": LocalTeacher(reference)}
    routes = ["expert", "reference", None]
    wanted = loss_and_gradient(RoutedTeacher(live, routes), mixed)
    spoken = {**live, "expert": cached(tmp_path, expert, of_expert)}
    found = loss_and_gradient(RoutedTeacher(spoken, routes), mixed, pack_to=24, routes=[0, 1, 2])
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_a_conversation_written_again_is_the_same(tmp_path, rows):
    model, settings = model_of(1), CacheSettings(threshold=0.2)
    cache = cached(tmp_path, model, rows, settings).cache
    alone = entries(
        model, [rows[3]], cache.vocabulary, settings, temperature=1.0, owner=cache.owner
    )[0]
    assert cache.rows.get(alone.key) == alone


def test_a_conversation_that_is_not_there_is_named(tmp_path, rows):
    teacher = cached(tmp_path, model_of(1), rows[:3])
    with pytest.raises(RunError, match="not in the cache") as refused:
        teacher.signal(collate([(0, rows[4])]))
    assert refused.value.do == "run it again"
    other_mask = Encoded(rows[0].input_ids, [True] * len(rows[0].input_ids))
    with pytest.raises(RunError, match="not in the cache"):
        teacher.signal(collate([(0, other_mask)]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": "other"}, "another teacher"),
        ({"tokenizer": "other"}, "another tokenizer or chat template"),
        ({"temperature": 2.0}, "another temperature"),
        ({"scheme": CacheSettings(threshold=0.3).identity}, "another scheme"),
        ({"vocabulary": 32}, "another vocabulary"),
    ],
)
def test_a_cache_of_something_else_is_refused(tmp_path, rows, change, message):
    cached(tmp_path, model_of(1), rows)
    with pytest.raises(InputError, match=message) as refused:
        Cache(tmp_path, identity_of(EVERYTHING, **change), remedy="run it again")
    assert refused.value.do is not None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 99}, "unknown format"),
        ({"format": None}, "unknown format"),
        ({"scheme": {"scheme": "best"}}, "unknown scheme"),
        ({"scheme": "best"}, "unknown scheme"),
        ({"weights": None}, "incomplete"),
        ({"vocabulary_file": "none.npy"}, "vocabulary of the cache"),
        ({"vocabulary_file": None}, "vocabulary of the cache"),
    ],
)
def test_a_manifest_that_means_nothing_is_refused(tmp_path, rows, change, message):
    cached(tmp_path, model_of(1), rows)
    path = tmp_path / MANIFEST
    manifest = {**json.loads(path.read_text()), **change}
    manifest = {k: v for k, v in manifest.items() if v is not None or k not in change}
    path.write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=message):
        Cache(tmp_path, identity_of(EVERYTHING), remedy="run it again")


@pytest.mark.parametrize("text", ["{", "[1]", ""])
def test_a_manifest_that_cannot_be_read_is_named(tmp_path, rows, text):
    cached(tmp_path, model_of(1), rows)
    (tmp_path / MANIFEST).write_text(text)
    with pytest.raises(InputError, match=MANIFEST):
        Cache(tmp_path, identity_of(EVERYTHING), remedy="run it again")


def test_every_file_of_a_cache_notices_a_flipped_bit(tmp_path, rows):
    teacher = cached(tmp_path, model_of(1), rows, CacheSettings())
    identity = teacher.cache.identity
    for path in [*shard_files(tmp_path), *tmp_path.glob("*.npy")]:
        whole = path.read_bytes()
        for place in range(0, len(whole), max(1, len(whole) // 31)):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 16]) + whole[place + 1 :])
            with pytest.raises(InputError):
                len(Cache(tmp_path, identity, remedy="run it again").rows)
        path.write_bytes(whole)
    assert len(Cache(tmp_path, identity, remedy="run it again").rows) == len(rows)


def test_the_second_to_create_a_cache_takes_the_firsts(tmp_path):
    identity = identity_of(EVERYTHING)
    tails = np.ones(VOCABULARY, np.float32)
    create(tmp_path, identity, TokenStats(np.arange(VOCABULARY), tails, 0.0), {})
    create(tmp_path, identity, TokenStats(np.arange(VOCABULARY)[::-1], tails, 0.0), {})
    cache = Cache(tmp_path, identity, remedy="")
    np.testing.assert_array_equal(cache.coder.ids, np.arange(VOCABULARY))
    assert not list(tmp_path.glob(".making-*"))


def test_padding_of_the_head_is_left_out(tmp_path, rows):
    model = model_of(1)
    settings = CacheSettings(scheme="top", top_p=1.0, k_max=VOCABULARY)
    vocabulary = measure_token_stats(model, rows, 27, settings, temperature=1.0)
    assert sorted(vocabulary.ids) == list(range(27))
    create(tmp_path, identity_of(settings, vocabulary=27), vocabulary, {})
    cache = Cache(tmp_path, identity_of(settings, vocabulary=27), remedy="")
    (entry, *_) = entries(model, rows[:1], vocabulary, settings, temperature=1.0, owner=cache.owner)
    assert cache.coder.decoded(entry.code, entry.key).ids.max() == 26


def test_a_shard_of_another_teacher_is_refused_and_so_is_each_of_its_rows(tmp_path, rows):
    """The keys are those of the conversations: alike for every teacher, unlike the ranks."""
    one = cached(tmp_path / "one", model_of(1), rows).cache
    other = cached(tmp_path / "other", model_of(2), rows).cache
    assert one.identity == other.identity, "only what was measured of the teacher differs"
    (shard,) = shard_files(other.folder)
    shutil.copy(shard, one.folder)
    with pytest.raises(InputError, match="not a shard of this cache"):
        len(Cache(one.folder, one.identity, remedy="run it again").rows)
    entry = other.rows.get(next(iter(keys_of(rows))))
    assert other.is_intact(entry)
    assert not one.is_intact(entry)
    with pytest.raises(Damaged):
        one.coder.decoded(entry.code, entry.key)


def test_a_shard_goes_where_the_cache_is_the_same(tmp_path, rows):
    """Two machines that share a manifest may add up their shards."""
    cache = cached(tmp_path / "one", model_of(1), rows).cache
    shutil.copytree(tmp_path / "one", tmp_path / "other")
    for shard in shard_files(tmp_path / "one"):
        (tmp_path / "other" / shard.name).unlink()
        shutil.copy(shard, tmp_path / "other")
    assert len(Cache(tmp_path / "other", cache.identity, remedy="").rows) == len(rows)


def keys_of(rows: list[Encoded]) -> list[bytes]:
    return [key_of_row(row) for row in rows]


def deep(manifest: Path) -> None:
    manifest.write_text('{"format": ' + "[" * 100_000)


def large(manifest: Path) -> None:
    with manifest.open("r+b") as file:
        file.truncate(2**40)  # without blocks


def a_pipe(manifest: Path) -> None:
    manifest.unlink()
    os.mkfifo(manifest)


def a_name_for_a_scheme(manifest: Path) -> None:
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"scheme": "threshold"}))


@pytest.mark.parametrize("harm", [deep, large, a_pipe, a_name_for_a_scheme])
def test_a_manifest_of_any_shape_is_one_message(tmp_path, rows, harm):
    identity = cached(tmp_path, model_of(1), rows).cache.identity
    harm(tmp_path / MANIFEST)
    with pytest.raises(InputError, match=r"manifest of the cache cannot be read|unknown scheme"):
        Cache(tmp_path, identity, remedy="run it again")


@pytest.mark.parametrize("shape", [(2, 2**38), (2, VOCABULARY), (2**62, 2**62), (2,)])
def test_a_vocabulary_that_claims_terabytes_takes_none(tmp_path, rows, shape):
    identity = cached(tmp_path, model_of(1), rows).cache.identity
    claim = {"descr": "<f8", "fortran_order": False, "shape": shape}
    with io.BytesIO() as file:
        np.lib.format.write_array_header_1_0(file, claim)
        content = file.getvalue() + bytes(64)
    named(tmp_path, content)
    with pytest.raises(InputError, match="vocabulary of the cache cannot be read"):
        Cache(tmp_path, identity, remedy="run it again")


def test_a_vocabulary_of_a_terabyte_is_not_read(tmp_path, rows):
    identity = cached(tmp_path, model_of(1), rows).cache.identity
    with named(tmp_path, b"").open("r+b") as file:
        file.truncate(2**40)
    with pytest.raises(InputError, match="at most"):
        Cache(tmp_path, identity, remedy="run it again")


def named(folder: Path, content: bytes) -> Path:
    """The vocabulary of a cache, replaced by other bytes under their own checksum."""
    manifest = json.loads((folder / MANIFEST).read_text())
    checksum = hashlib.blake2b(content, digest_size=16).hexdigest()
    manifest["vocabulary_file"] = f"{checksum}.vocabulary.npy"
    (folder / MANIFEST).write_text(json.dumps(manifest))
    path = folder / manifest["vocabulary_file"]
    path.write_bytes(content)
    return path


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "dominie-cache"]


def assert_same_targets(one: Signal, other: Signal) -> None:
    for mine, its in zip(one.parts, other.parts, strict=True):
        assert mine.rows.tolist() == its.rows.tolist()
        assert torch.equal(mine.target.ids, its.target.ids)
        assert torch.equal(mine.target.probabilities, its.target.probabilities)


@pytest.mark.parametrize("together", [1, 2])
def test_what_is_decoded_ahead_is_what_is_decoded_when_it_is_asked_for(
    tmp_path, rows, together, monkeypatch
):
    teacher = RoutedTeacher({"t": cached(tmp_path, model_of(1), rows)}, ["t", None])
    parts = (rows[:3], rows[3:5], rows[5:7], rows[7:])
    batches = [collate([(0, row) for row in part] + [(1, rows[0])]) for part in parts]
    expected = [teacher.signal(batch) for batch in batches]
    by_thread: list[str] = []
    decoded = Cache.decoded

    def noted(*arguments: Any) -> Any:
        by_thread.append(threading.current_thread().name)
        return decoded(*arguments)

    monkeypatch.setattr(Cache, "decoded", noted)
    prefetch = TeacherPrefetch(teacher, together)
    for _ in range(2):
        prefetch.start_step(batches)
        for signal in expected:
            assert_same_targets(prefetch.next(), signal)
    assert by_thread == ["dominie-cache"] * 2 * len(rows), "each conversation of the cache once"
    by_thread.clear()
    prefetch.start_step(batches[:2], lambda: [s for b in batches[2:3] for s in b.spans])
    assert_same_targets(prefetch.next(), expected[0])
    assert_same_targets(prefetch.next(), expected[1])
    assert teacher.teachers["t"]._ahead is not None, "what follows is begun with the last one"
    prefetch.start_step(batches[2:3])
    assert_same_targets(prefetch.next(), expected[2])
    assert len(by_thread) == 7, "and not decoded again by the step that it belongs to"
    prefetch.start_step(batches)
    prefetch.start_step(batches[1:])  # the first step was left
    assert_same_targets(prefetch.next(), expected[1])
    assert_same_targets(teacher.signal(batches[0]), expected[0])  # asked for in between
    assert_same_targets(prefetch.next(), expected[2])
    prefetch.close()
    assert not threads()


def test_an_error_of_decoding_ends_the_micro_batch_that_needs_it(tmp_path, rows):
    teacher = cached(tmp_path, model_of(1), rows[:5])
    prefetch = TeacherPrefetch(teacher, 1)
    first, second = (collate([(0, row) for row in part]) for part in (rows[:3], rows[4:6]))
    prefetch.start_step([first, second])
    assert len(prefetch.next().parts[0].target) == sum(first.supervised_by_row)
    with pytest.raises(RunError) as ahead:
        prefetch.next()
    with pytest.raises(RunError) as asked:
        teacher.signal(second)
    assert str(ahead.value) == str(asked.value)
    prefetch.close()
    assert not threads()


def test_a_thread_that_nobody_waits_for_ends(tmp_path, rows, monkeypatch):
    begun, go_on = threading.Event(), threading.Event()
    seen: list[bytes] = []

    def slow(_: Cache, key: bytes, tokens: int) -> None:
        seen.append(key)
        begun.set()
        go_on.wait(10)

    prefetch = TeacherPrefetch(cached(tmp_path, model_of(1), rows), 1)
    monkeypatch.setattr(Cache, "decoded", slow)
    prefetch.start_step([collate([(0, row) for row in rows])])
    assert begun.wait(10)
    threading.Timer(0.05, go_on.set).start()
    prefetch.close()
    assert len(seen) == 1, "the rest was not decoded"
    assert not threads()
