"""A recipe's text is read in bounded time and memory, whatever it holds."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from dominie.core.errors import InputError
from dominie.recipe import load_recipe, recipe_of
from dominie.recipe.train_arguments import _RANGES
from dominie.recipe.yaml_text import parsed_yaml, read_text

MINI = Path(__file__).parents[1] / "recipes" / "mini.yaml"
#: Unfolds to 10^12 values.
BOMB = "a: &a [1,1,1,1,1,1,1,1,1,1]\n" + "\n".join(
    f"{name}: &{name} [{','.join([f'*{before}'] * 10)}]"
    for before, name in zip("abcdefghijk", "bcdefghijkl", strict=True)
)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (BOMB, "too large.*values"),
        ("[" * 300 + "]" * 300, "nested too deeply|not valid YAML"),
        ("[" * 30_000, "not valid YAML"),
        ("a: &a {b: *a}", "contains itself"),
        ("a: &a [*a]", "contains itself"),
        ('{a: {b: "x\\0y"}}', "a.b.*NUL"),
        ('{"x\\0y": 1}', "NUL"),
        ("{a: [1, 1.0e+308]}", "a.1.*out of all proportion"),
        ("{a: 9223372036854775808}", "out of all proportion"),
        ("{a: -1.0e-320}", "out of all proportion"),
        (f"{{a: {'9' * 5000}}}", "out of all proportion|not valid YAML"),
    ],
)
def test_text_that_no_recipe_has_is_refused_at_once(text, said):
    before = time.process_time()
    with pytest.raises(InputError, match=f"(?s){said}"):
        parsed_yaml(text, where="r.yaml")
    assert time.process_time() - before < 5


def test_an_alias_used_twice_is_no_repetition_without_end():
    assert parsed_yaml("{a: &x {n: 1}, b: *x}", where="r") == {"a": {"n": 1}, "b": {"n": 1}}


def test_many_keys_are_refused_before_they_are_parsed(tmp_path):
    file = tmp_path / "r.yaml"
    file.write_text("".join(f"k{n}: {n}\n" for n in range(500_000)))
    before = time.process_time()
    with pytest.raises(InputError, match=r"(?s)too large.*KiB"):
        load_recipe(file)
    assert time.process_time() - before < 1


def test_a_device_without_an_end_is_read_to_the_limit():
    with pytest.raises(InputError, match="too large"):
        read_text(Path("/dev/zero"))


def test_a_byte_order_mark_is_no_part_of_the_first_key(tmp_path):
    (tmp_path / "r.yaml").write_bytes(b"\xef\xbb\xbf" + MINI.read_bytes())
    assert load_recipe(tmp_path / "r.yaml").stages.keys() == load_recipe(MINI).stages.keys()


def test_a_mapping_is_bounded_like_a_file():
    with pytest.raises(InputError, match=r"train\.seed.*proportion"):
        recipe_of({"name": "r", "train": {"seed": 2**70}})


@pytest.mark.parametrize(
    "override",
    [f"train.{name}={least - 0.5}" for name, (least, _) in _RANGES.items() if "num" not in name]
    + ["train.dataloader_num_workers=-1", "train.adam_beta1=1", "train.weight_decay=1e14"]
    + ["train.batch=2147483648", "train.steps=0", "train.seed=4294967296", "train.lora.r=10000000"],
)
def test_a_number_out_of_range_is_refused_at_load(override):
    with pytest.raises(InputError, match=override.partition("=")[0].rpartition(".")[2]):
        load_recipe(MINI, [override])
