"""What a cache refuses: losses it cannot serve, folders that are another's, damaged shards."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

RECIPE = """
name: small
data: {d: {path: d.jsonl, test_fraction: 0.2, validation_fraction: 0.1}}
models: {t: {path: m}}
train: {learning_rate: 1e-3, steps: 2, batch: 4, max_length: 64}
stages:
  s: {student: m, teacher: t, data: {d: 1.0}, loss: {prediction: 1.0}, cache: true}
"""


@pytest.fixture(autouse=True)
def recipe(work) -> None:
    (work / "r.yaml").write_text(RECIPE)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("stages.s.loss.attention=1.0", ("attention", "in memory", "stages.s.data.d.cache=false")),
        ("stages.s.loss.prediction.kind=jsd", ("sparse target", "forward_kl", "jsd")),
        ("stages.s.loss={next_token: 1.0}", ("stages.s.cache", "no teacher")),
        ("stages.s.cache.threshold=2", ("stages.s.cache", "threshold")),
        ("stages.s.cache.scheme=best", ("stages.s.cache.scheme", "threshold")),
        ("stages.s.cache.treshold=0.1", ("did you mean threshold?",)),
        ("stages.s.cache=yes please", ("stages.s.cache",)),
        ("stages.s.data.d.cache=1", ("stages.s.data.d.cache", "true or false")),
    ],
)
def test_what_a_cached_teacher_cannot_do_is_refused(refused, dominie, override, words):
    refused(dominie("cache", "r.yaml", override), *words)
    refused(dominie("run", "r.yaml", override), *words)


def test_a_source_without_a_teacher_has_nothing_to_cache(refused, dominie):
    overrides = ("stages.s.loss={next_token: 1.0}", "stages.s.data.d.cache=true")
    refused(dominie("cache", "r.yaml", *overrides), "stages.s.data.d.cache", "no teacher")


def test_a_recipe_without_caches(refused, dominie):
    refused(dominie("cache", "r.yaml", "stages.s.cache=false"), "stages.s.cache=true")


def test_cache_is_no_name_of_a_stage(refused, work, dominie):
    (work / "r.yaml").write_text(RECIPE.replace("  s: {", "  cache: {"))
    refused(dominie("run", "r.yaml"), "'cache'", "none of cache")


def test_a_named_folder_that_holds_another_cache(refused, work, dominie):
    assert dominie("cache", "r.yaml", "stages.s.cache.folder=kept").status == 0
    for override, word in (
        ("stages.s.loss.prediction.temperature=2", "temperature"),
        ("stages.s.cache.threshold=0.1", "scheme"),
        ("models.t.dtype=bf16", "teacher"),
    ):
        said = dominie("cache", "r.yaml", "stages.s.cache.folder=kept", override)
        refused(said, f"another {word}", "manifest.json", "another folder")
    template = work / "m" / "chat_template.jinja"
    template.write_text(template.read_text() + "{# changed #}")
    said = dominie("run", "r.yaml", "stages.s.cache.folder=kept")
    refused(said, "another tokenizer or chat template")


def test_a_folder_that_cannot_be_made(refused, work, dominie):
    said = dominie("cache", "r.yaml", "stages.s.cache.folder=d.jsonl")
    refused(said, "cannot be written", status=1)


def test_a_damaged_shard_is_an_error_and_mended_by_cache(refused, work, dominie):
    assert dominie("cache", "r.yaml").status == 0
    (shard,) = Path("runs/small/cache").glob("*/shard-*.arrow")
    whole = bytearray(shard.read_bytes())
    whole[len(whole) // 2] ^= 1
    shard.write_bytes(whole)
    refused(dominie("run", "r.yaml"), shard.name, "damaged", "dominie cache")
    mended = dominie("cache", "r.yaml", "--json")
    assert mended.status == 0, mended.err
    assert f"{shard.name}: damaged" in mended.err
    record = json.loads(mended.out)["caches"][0]
    assert 8 <= record["conversations"] < 32  # what two steps of four come by, and validation
    assert dominie("run", "r.yaml").status == 0


@pytest.mark.parametrize("text", ["{", '{"format": 7}'])
def test_a_broken_manifest_is_named(refused, work, dominie, text):
    assert dominie("cache", "r.yaml").status == 0
    (manifest,) = Path("runs/small/cache").glob("*/manifest.json")
    manifest.write_text(text)
    refused(dominie("run", "r.yaml"), "manifest.json")
