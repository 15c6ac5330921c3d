"""What a recipe may not say of answers that a student writes itself: one message each."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest

from dominie.core.errors import InputError
from dominie.data.row_store import Row
from dominie.recipe import load_recipe, recipe_of
from dominie.recipe.load import dump_recipe
from dominie.recipe.on_policy_checks import on_policy_notices
from dominie.stages.fingerprint import training_parts
from dominie.toyworld.toy_models import word_tokenizer
from dominie.training.stage_sources import StageSource

GOOD: dict[str, Any] = {
    "name": "on-policy",
    "data": {
        "shop": "toyworld:domain?rows=20",
        "asked": {"path": "toyworld:general?rows=20", "prompts": True},
    },
    "models": {"cold": {"path": "toyworld:teacher", "placement": "cached"}},
    "train": {"max_length": 64},
    "stages": {
        "align": {
            "student": "toyworld:student",
            "teacher": "toyworld:teacher",
            "data": {
                "shop": {"share": 0.5, "on_policy": 0.5},
                "asked": {"share": 0.5, "on_policy": 1.0},
            },
            "loss": {"prediction": {"kind": "reverse_kl"}},
            "rollouts": {"max_new_tokens": 16},
        }
    },
}


def changed(**values: Any) -> dict[str, Any]:
    """The recipe with values at paths, `__` between keys; None removes a key."""
    tree = copy.deepcopy(GOOD)
    for path, value in values.items():
        *keys, last = path.split("__")
        node = tree
        for key in keys:
            node = node[key]
        if value is None:
            del node[last]
        else:
            node[last] = value
    return tree


ALIGN = "stages__align__"
SHOP = f"{ALIGN}data__shop__"
SHOWN = {"model": "toyworld:student", "shows": "answer"}


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({f"{ALIGN}data__shop__on_policy": 1.5}, "on_policy must be from 0 to 1, got 1.5"),
        ({f"{ALIGN}data__shop__on_policy": float("nan")}, "on_policy"),
        ({f"{ALIGN}data__asked__on_policy": None}, "no answers to learn from"),
        ({f"{ALIGN}data__asked__on_policy": 0.5}, "the student writes every answer"),
        ({f"{ALIGN}data": {"shop": 1.0}}, "it answers nothing"),
        ({f"{ALIGN}rollouts__max_new_tokens": 64}, "less than train.max_length, now 64"),
        ({f"{ALIGN}rollouts__max_new_token": 6}, "did you mean max_new_tokens"),
        ({f"{ALIGN}rollouts__every": 8}, "every must be from 1 to 4"),
        ({f"{ALIGN}loss": {"next_token": 1.0}}, "need a teacher to mark them"),
        ({f"{ALIGN}loss": {"prediction": 1.0, "next_token": 0.1}}, "by heart"),
        ({f"{ALIGN}cache": True, f"{ALIGN}loss": {"prediction": 1.0}}, "cached teacher"),
        ({f"{ALIGN}teacher": "cold", f"{ALIGN}loss": {"prediction": 1.0}}, "cached teacher"),
        ({f"{ALIGN}train": {"fsdp": "full_shard"}}, "DeepSpeed or FSDP1 cuts up its weights"),
        ({"data__asked__test_fraction": 0.5}, "no answers to validate or test"),
        ({f"{ALIGN}rollouts__start_new_tokens": 17}, "from 1 to max_new_tokens, 16, got 17"),
        ({f"{ALIGN}rollouts__grow_over": 0.5}, "start_new_tokens, from which length, is missing"),
        ({f"{ALIGN}data__asked__teacher": SHOWN}, "a source of prompts has none"),
        ({f"{ALIGN}teacher": SHOWN}, "a source of prompts has none"),
        ({f"{SHOP}teacher": SHOWN, f"{SHOP}loss": {"attention": 1.0}}, "cannot be compared"),
        (
            {f"{SHOP}teacher": SHOWN, f"{SHOP}loss": {"spans": 1.0}, f"{SHOP}on_policy": 0.0},
            "no right answer with it",
        ),
        ({f"{SHOP}teacher": SHOWN | {"model": "cold"}, f"{SHOP}on_policy": 0.0}, "a cache keeps"),
        ({f"{SHOP}teacher": SHOWN | {"shows": "hint"}}, "teacher.shows"),
        ({f"{SHOP}teacher": SHOWN | {"show": "answer"}}, "did you mean shows"),
        ({f"{SHOP}teacher": SHOWN | {"text": "no place"}}, "text must hold {answer} once"),
        ({f"{SHOP}teacher": {"model": "toyworld:student"}}, "missing key"),
        ({f"{SHOP}teacher": 3}, "data.shop.teacher"),
        ({f"{SHOP}teacher": SHOWN | {"model": "toywold"}}, "unknown stage or model 'toywold'"),
    ],
)
def test_each_mistake_has_its_message(values, said):
    with pytest.raises(InputError) as caught:
        recipe_of(changed(**values))
    assert said in str(caught.value)


PLAIN = word_tokenizer().chat_template
ENDED_OTHERWISE = PLAIN.replace("message.content + eos_token", "message.content + '<pad>'")
WORDS_ALONE = (
    "{% for m in messages %}{{ m.role + ' : ' + m.content + ' . ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant : ' }}{% endif %}"
)
FIVE = Row([2, 5, 9, 3, 6, 8, 3], [False] * 5 + [True] * 2)


def notices(
    rows: list[Row], student: str | None = PLAIN, teacher: str | None = PLAIN, **changes: Any
) -> list[str]:
    """What is told of a source that is answered; the teacher lacks the tokens `without`."""
    made = {"align": word_tokenizer(), "teacher": word_tokenizer()}
    made["align"].chat_template, made["teacher"].chat_template = student, teacher
    if (without := changes.pop("without", None)) is not None:
        known = {k: v for k, v in made["teacher"].get_vocab().items() if k != without}
        made["teacher"].get_vocab = lambda: known
    source = StageSource(
        name="shop", train=rows, validation=(), share=1.0, teacher="teacher", on_policy=0.5
    )
    stage = recipe_of(changed(**changes)).trained["align"]
    return list(on_policy_notices("align", stage, [source], SimpleNamespace(of=made.__getitem__)))


def test_what_does_not_suit_answers_is_told():
    (line,) = notices([FIVE])
    assert line.startswith("align: the student answers 50 % of shop, up to 16 tokens each; the")
    assert "the oldest go beyond 1.1 GB" in line
    (_, line) = notices([FIVE], teacher=ENDED_OTHERWISE)
    assert "teacher ends its answers with '<pad>' and the student with '<|end|>'" in line
    (_, line) = notices([FIVE], teacher=PLAIN + " ")
    assert "teacher has another chat template than the student" in line
    (_, line) = notices([FIVE, Row(FIVE.input_ids[:4], [*FIVE.supervised[:3], True])])
    assert "prompts of shop do not end as the chat template asks" in line
    (_, line) = notices([FIVE, FIVE, Row([*range(7, 57), 6, 8], [False] * 51 + [True])])
    assert "33.3 % of the prompts of shop leave less room than rollouts.max_new_tokens" in line
    lines = notices([FIVE, Row([8, 3], [True, True])])
    assert "50 % of the conversations of shop have no prompt of 1 to 63 tokens" in lines[1]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"rows": [Row([8, 3], [True, True])]}, "no conversation has a prompt"),
        ({"student": WORDS_ALONE}, "answers would never end"),
        ({"without": "<|end|>"}, "does not know the token that ends the student's answers"),
    ],
    ids=["prompts", "end", "teacher"],
)
def test_answers_that_cannot_be_are_refused(given, said):
    with pytest.raises(InputError) as caught:
        notices(**{"rows": [FIVE], **given})
    assert said in str(caught.value)


def parts_of(tree: dict[str, Any]) -> Any:
    recipe = recipe_of(tree)
    stage = recipe.trained["align"]
    rows = dict.fromkeys(stage.active, "rows")
    models = {"toyworld:student": "s", "toyworld:teacher": "t"}
    return training_parts(recipe, "align", rows=rows, models=models)


def test_only_what_changes_the_model_is_in_the_fingerprint(tmp_path):
    good = parts_of(GOOD)
    assert parts_of(changed(stages__align__rollouts__batch=3)) == good
    assert parts_of(changed(stages__align__rollouts__every=2)) != good
    assert parts_of(changed(stages__align__data__shop__on_policy=0.25)) != good
    plain = {f"{ALIGN}data": {"shop": {"share": 1.0}}, f"{ALIGN}rollouts": None}
    zero = {f"{ALIGN}data": {"shop": {"share": 1.0, "on_policy": 0.0}}}
    assert parts_of(changed(**plain)) == parts_of(changed(**zero))
    assert "rollouts" not in str(parts_of(changed(**plain)))


def test_a_recipe_with_answers_is_written_and_read_again(tmp_path):
    recipe = recipe_of(GOOD)
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
    assert load_recipe(tmp_path) == recipe
