"""The fingerprint of a model's weights."""

from __future__ import annotations

import json
import os
import shutil

import pytest

from dominie.core.content_hash import LARGE
from dominie.models.spec import Model
from dominie.models.weights import prepare_export, weights_fingerprint
from dominie.stages.fingerprint import model_fingerprint
from dominie.toyworld.toy_models import save_model, word_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "m"
    save_model("student", path, seed=0)
    return path


def test_a_copy_is_the_same_model(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "elsewhere")
    assert weights_fingerprint(Model(path=str(copy))) == weights_fingerprint(
        Model(path=str(folder))
    )


def test_other_weights_settings_or_precision_are_another(folder, tmp_path):
    known = weights_fingerprint(Model(path=str(folder)))
    save_model("student", tmp_path / "other", seed=1)
    changed = shutil.copytree(folder, tmp_path / "changed")
    config = changed / "config.json"
    config.write_text(config.read_text().replace('"rms_norm_eps": ', '"rms_norm_eps": 1'))
    found = {
        weights_fingerprint(Model(path=str(tmp_path / "other"))),
        weights_fingerprint(Model(path=str(changed))),
        weights_fingerprint(Model(path=str(folder), dtype="bf16")),
    }
    assert len(found | {known}) == 4


def test_one_byte_of_a_large_file_is_another_model(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    file = tmp_path / "model.safetensors"
    with file.open("wb") as out:
        out.truncate(LARGE + 5)
    times = file.stat()
    for fingerprint in (model_fingerprint, weights_fingerprint):
        known = fingerprint(Model(path=str(tmp_path)))
        with file.open("r+b") as out:
            out.seek(LARGE // 3)
            out.write(b"x" if fingerprint is model_fingerprint else b"y")
        os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
        assert fingerprint(Model(path=str(tmp_path))) != known


def test_a_model_stops_where_its_template_ends_an_answer(tmp_path):
    tokenizer = word_tokenizer()
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    for config, settings, expected in (
        ({"use_cache": False, "eos_token_id": 7}, {}, [7, end]),
        ({}, {"eos_token_id": [8, 9], "temperature": 0.5}, [8, 9, end]),
        ({}, {"eos_token_id": end}, end),
        (None, None, end),  # an adapter
    ):
        for name, value in (("config.json", config), ("generation_config.json", settings)):
            (tmp_path / name).unlink(missing_ok=True)
            if value:
                (tmp_path / name).write_text(json.dumps(value))
        prepare_export(tmp_path, tokenizer)
        made = json.loads((tmp_path / "generation_config.json").read_text())
        assert made["eos_token_id"] == expected
        assert made["pad_token_id"] == tokenizer.pad_token_id
        assert made.get("temperature") == (settings or {}).get("temperature")
        if config:
            assert json.loads((tmp_path / "config.json").read_text())["use_cache"] is True
