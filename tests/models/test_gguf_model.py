"""Models in GGUF files: what the header tells, the folder that is made, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

import dominie
from dominie.core.errors import InputError
from dominie.models.gguf_header import read_header
from dominie.models.gguf_model import dequantised
from dominie.models.info import describe
from dominie.models.loading import load_frozen, load_tokenizer
from dominie.models.spec import Model

gguf = pytest.importorskip("gguf", reason="pip install 'dominie[gguf]'")
from tiny_gguf import TEMPLATE, tiny_gguf, tiny_llama  # noqa: E402 - gguf makes it

HOSTILE = {
    "keys": b"GGUF" + (3).to_bytes(4, "little") + bytes(8) + (2**60).to_bytes(8, "little"),
    "text": b"GGUF" + (3).to_bytes(4, "little") + bytes(8) + b"\1" + bytes(7) + b"\xff" * 8,
    "version": b"GGUF" + (9).to_bytes(4, "little") + bytes(16),
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    return tiny_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


@pytest.fixture(scope="module")
def rounded(tmp_path_factory) -> Path:
    return tiny_gguf(tmp_path_factory.mktemp("gguf") / "tiny-q8.gguf", kind="Q8_0")


def test_floats_come_out_as_they_are(plain, tmp_path):
    folder = dequantised(Model(path=str(plain)), tmp_path)
    model, expected = load_frozen(Model(path=str(folder))), tiny_llama()
    ids = torch.tensor([[7, 100, 3, 250, 41]])
    assert torch.equal(model(ids).logits, expected(ids).logits)
    assert model.config.dtype == torch.float32
    assert not hasattr(model.config, "quantization_config")


def test_rounded_weights_come_out_as_gguf_dequantises_them(rounded, tmp_path):
    folder = dequantised(Model(path=str(rounded)), tmp_path)
    found, whole = load_frozen(Model(path=str(folder))).state_dict(), tiny_llama().state_dict()
    kind = gguf.GGMLQuantizationType.Q8_0
    for name in ("model.embed_tokens.weight", "model.layers.1.mlp.down_proj.weight"):
        there_and_back = gguf.dequantize(gguf.quantize(whole[name].numpy(), kind), kind)
        assert torch.equal(found[name], torch.from_numpy(there_and_back))
        assert not torch.equal(found[name], whole[name])
    header = read_header(rounded)
    assert (header.rounded, header.dtype, header.architecture) == ("Q8_0", "fp32", "llama")
    assert header.parameters == sum(p.numel() for p in tiny_llama().parameters())
    half = dequantised(Model(path=str(rounded), dtype="bf16"), tmp_path)
    assert half != folder
    assert load_frozen(Model(path=str(half))).dtype == torch.bfloat16


def test_the_file_alone_tells_sizes_and_tokens_and_the_folder_the_same(rounded, tmp_path):
    spec = Model(path=str(rounded))
    folder = Model(path=str(dequantised(spec, tmp_path)))
    before, after = describe(spec), describe(folder)
    for fact in ("family", "vocabulary", "context", "layers", "heads", "key_heads", "hidden_size"):
        assert getattr(before, fact) == getattr(after, fact), fact
    assert (before.dtype, before.rounded, after.rounded) == ("fp32", "Q8_0", None)
    ours, theirs = load_tokenizer(spec), load_tokenizer(folder)
    assert ours.get_vocab() == theirs.get_vocab()
    assert ours.chat_template == theirs.chat_template == TEMPLATE
    chat = [{"role": "user", "content": "the thé 7"}, {"role": "assistant", "content": "日"}]
    text = ours.apply_chat_template(chat, tokenize=False)
    ids = ours(text)["input_ids"]
    assert ids == theirs(text)["input_ids"]
    assert ours.decode(ids) == text
    assert ours.convert_ids_to_tokens(ids)[1] == "the"
    ours.chat_template = "changed"
    assert load_tokenizer(spec).chat_template == TEMPLATE


def test_it_is_made_once_for_each_content_and_again_if_damaged(plain, tmp_path):
    spec = Model(path=str(plain))
    folder = dequantised(spec, tmp_path)
    weights = folder / "model.safetensors"
    first = weights.stat().st_mtime_ns
    assert dequantised(spec, tmp_path) == folder
    assert weights.stat().st_mtime_ns == first
    moved = shutil.copy(plain, tmp_path / plain.name)
    assert dequantised(Model(path=str(moved)), tmp_path) == folder
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-8])
    assert dequantised(spec, tmp_path) == folder
    assert weights.read_bytes() == whole
    other = tiny_gguf(tmp_path / "x.gguf", seed=1)
    assert dequantised(Model(path=str(other)), tmp_path) != folder


def test_what_a_killed_conversion_leaves_is_not_taken_for_whole(plain, tmp_path, monkeypatch):
    spec = Model(path=str(plain))

    def killed(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as during:
        during.setattr("dominie.models.gguf_model.write_checksummed", killed)
        with pytest.raises(KeyboardInterrupt):
            dequantised(spec, tmp_path / "a")
    assert not [path for path in (tmp_path / "a").iterdir() if path.is_dir()]
    folder = dequantised(spec, tmp_path / "b")
    torn = tmp_path / "a" / folder.name  # as if it had been cut off before its last file
    shutil.copytree(folder, torn, ignore=shutil.ignore_patterns(".gguf.json", "tokenizer.json"))
    assert dequantised(spec, tmp_path / "a") == torn
    assert (torn / "tokenizer.json").is_file()


@pytest.mark.parametrize("share", [0.001, 0.3, 0.999])
def test_a_file_that_was_cut_off_is_refused(plain, tmp_path, share):
    content = plain.read_bytes()
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(content[: max(8, int(share * len(content)))])
    with pytest.raises(InputError, match="cut off") as error:
        describe(Model(path=str(cut)))
    assert error.value.do == "copy or download the file again"


@pytest.mark.parametrize("name", sorted(HOSTILE))
def test_a_header_that_promises_too_much_is_refused_at_once(tmp_path, name):
    file = tmp_path / "hostile.gguf"
    file.write_bytes(HOSTILE[name] + bytes(64))
    with pytest.raises(InputError, match=r"header|cut off"):
        read_header(file)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("m-00001-of-00003.gguf", {}, "one of 3 parts"),
        ("m.gguf", {"split__count": 2}, "one of 2 parts"),
        ("m.gguf", {"general__type": "adapter"}, "no model"),
        ("m.gguf", {"architecture": "clip"}, "family clip"),
        ("m.gguf", {"llama__expert_count": 2**30}, "nobody can load"),
    ],
)
def test_files_of_other_kinds_are_refused_with_one_message(tmp_path, name, options, message):
    file = tiny_gguf(tmp_path / name, **options)
    with pytest.raises(InputError) as error:
        describe(Model(path=str(file)))
    assert message in str(error.value)
    assert str(file) in str(error.value)


def test_what_is_no_gguf_file_or_is_not_there_is_refused(tmp_path):
    text = tmp_path / "text.gguf"
    text.write_text("not weights")
    for path, message in ((text, "not a GGUF file"), (tmp_path / "none.gguf", "no such GGUF")):
        with pytest.raises(InputError, match=message):
            load_tokenizer(Model(path=str(path)))


def test_without_the_package_the_message_says_how_to_get_it(plain, monkeypatch):
    monkeypatch.setattr("dominie.models.gguf_header.find_spec", lambda _: None)
    with pytest.raises(InputError) as error:
        describe(Model(path=str(plain)))
    assert error.value.do == "pip install 'dominie[gguf]'"


def test_a_run_from_a_gguf_file(rounded, tmp_path):
    """Checked and planned from the header; dequantised when it is trained from, and told."""
    recipe = {
        "name": "from-gguf",
        "data": {"general": {"path": "toyworld:general?rows=40", "test_fraction": 0.2}},
        "train": {"steps": 2, "batch": 2, "max_length": 128, "learning_rate": 1e-3},
        "stages": {
            "tuned": {
                "student": str(rounded),
                "teacher": str(rounded),
                "data": {"general": 1.0},
                "loss": {"prediction": 1.0},
            }
        },
        "evaluate": {
            "models": {"before": str(rounded), "after": "tuned"},
            "tasks": {"nll": {"source": "general", "metric": "agreement", "teacher": str(rounded)}},
        },
    }
    checked = dominie.check(recipe, runs=tmp_path)
    assert checked.plan is not None
    made = tmp_path / "from-gguf" / "gguf"
    assert not made.exists(), "a check dequantises nothing"
    run = dominie.run(recipe, runs=tmp_path)
    assert len([path for path in made.iterdir() if path.is_dir()]) == 1
    assert run.results["before"]["nll"]["score"] == 1.0
    card = (run.folder / "tuned" / "model" / "README.md").read_text("utf-8")
    assert "rounded to Q8_0" in card
    assert "license: apache-2.0" in card
    record = json.loads((run.folder / "tuned" / "stage.json").read_text("utf-8"))
    shutil.rmtree(made)  # it is made again, and nothing is trained again
    again = dominie.run(recipe, runs=tmp_path)
    assert json.loads((again.folder / "tuned" / "stage.json").read_text("utf-8")) == record


def test_a_student_is_cut_from_a_file(rounded, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"{n} and {n}?", "completion": str(2 * n)} for n in range(24)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {
        "name": "cut",
        "models": {"big": {"path": str(rounded)}},
        "data": {"sums": {"path": "rows.jsonl", "validation_fraction": 0.3}},
        "train": {"max_length": 64},
        "stages": {"small": {"prune": {"model": "big", "layers": 1, "source": "sums"}}},
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    dominie.run(tmp_path / "recipe.yaml")
    made = json.loads((tmp_path / "runs" / "cut" / "small" / "stage.json").read_text())
    assert (made["kept_layers"], made["layers_before"]) == ([0], 2)
    assert {"loss_before", "loss_after"} <= made.keys()
    found = load_frozen(Model(path=str(tmp_path / "runs" / "cut" / "small" / "model")))
    whole = load_frozen(Model(path=str(dequantised(Model(path=str(rounded)), tmp_path))))
    assert torch.equal(
        found.state_dict()["model.layers.0.mlp.up_proj.weight"],
        whole.state_dict()["model.layers.0.mlp.up_proj.weight"],
    )
