"""`train.balance` in a recipe: its short form, what is refused, and when it makes another stage."""

from __future__ import annotations

import pytest

from dominie.core.errors import InputError
from dominie.recipe import dump_recipe, load_recipe
from dominie.stages.fingerprint import digest, training_parts
from dominie.training.settings import Balance

RECIPE = """
data: {shop: {path: shop.jsonl}, law: {path: law.jsonl}, general: {path: general.jsonl}}
train: {steps: 2, batch: 4}
stages:
  base: {student: org/m, data: {general: 1.0}, loss: {next_token: 1.0}}
  a: {student: base, data: {shop: 1.0}, loss: {next_token: 1.0}}
  b: {student: base, data: {law: 1.0}, loss: {next_token: 1.0}}
  align:
    student: base
    data:
      shop: {share: 0.1, teacher: a}
      law: {share: 0.1, teacher: b}
      general: {share: 0.8, teacher: base}
    loss: {prediction: 1.0}
"""
GAP = "stages.align.train.balance={by: tokens, gap: 1.0}"


@pytest.fixture
def recipe(tmp_path):
    (tmp_path / "r.yaml").write_text(RECIPE)
    return lambda *overrides: load_recipe(tmp_path / "r.yaml", overrides)


def test_a_bare_value_is_what_shares_are_shares_of(recipe, tmp_path):
    assert recipe().trained["align"].train.balance == Balance()
    found = recipe("train.balance=conversations", "stages.b.train.balance=tokens")
    assert found.trained["align"].train.balance == Balance(by="conversations")
    assert found.trained["b"].train.balance == Balance()
    found = recipe(GAP, "stages.align.train.balance.cap=30.0")
    assert found.trained["align"].train.balance == Balance(by="tokens", gap=1.0, cap=30.0)
    assert recipe("train.balance=tokens", "train.balance.cap=9.0").train.balance.cap == 9.0
    (tmp_path / "again.yaml").write_text(dump_recipe(found))
    assert load_recipe(tmp_path / "again.yaml") == found


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["train.balance=token"], ["train.balance.by", "conversations", "tokens"]),
        (["train.balance={by: conversations, gap: 1.0}"], ["add by: tokens"]),
        (["train.balance={by: conversations, cap: 30.0}"], ["add by: tokens"]),
        (["train.balance={by: tokens, cap: 0.5}"], ["cap must be finite and at least 1"]),
        (["train.balance={by: tokens, gap: 0.0}"], ["gap must be above 0"]),
        (["train.balance={by: tokens, gap: 1.0}"], ["stages.base.train.balance.gap", "no gap"]),
        ([GAP, "stages.align.data.law.loss={next_token: 1.0}"], ["law without a teacher"]),
        ([GAP, "stages.align.data.law.loss={attention: 1.0}"], ["without a prediction loss"]),
        ([GAP, "stages.align.data.law.share=0.0"], ["there are not two", "shop"]),
        (
            [GAP, "models={same: {path: org/m}}", "stages.align.student=same",
             "stages.align.data.law.teacher=org/m", "stages.align.data.general.teacher=same"],
            ["there are not two", "shop"],
        ),
        (
            [GAP, "stages.align.data.law.loss={prediction: {kind: reverse_kl}}"],
            ["different quantities", "shop, law"],
        ),
        ([GAP, "stages.align.train.mixing=steps"], ["each step has one source"]),
    ],
)  # fmt: skip
def test_what_cannot_be_balanced_is_refused(recipe, overrides, expected):
    with pytest.raises(InputError) as refused:
        recipe(*overrides)
    assert all(part in str(refused.value) for part in expected), str(refused.value)


def test_a_balance_that_changes_no_weight_makes_no_other_stage(recipe):
    def fingerprint(stage: str, *overrides: str) -> str:
        found = recipe(*overrides)
        models = {name: name for name in ("org/m", *found.stages)}
        rows = dict.fromkeys(found.data, "rows")
        return digest(*training_parts(found, stage, rows=rows, models=models))

    plain, steps = "train.balance=conversations", "train.mixing=steps"
    assert fingerprint("a", plain) == fingerprint("a"), "of one source"
    assert fingerprint("align", plain, steps) == fingerprint("align", steps)
    of_one = {fingerprint("align"), fingerprint("align", plain), fingerprint("align", GAP)}
    assert len(of_one) == 3
