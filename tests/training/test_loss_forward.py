"""A term that only this file knows is trained, differentiated and logged."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from gradients import assert_equal_gradients, ragged_rows
from torch.nn.functional import cross_entropy

from dominie.losses.forward_pass import BySource, ForwardPass
from dominie.losses.objective import Column, Computed, Objective, Term
from dominie.losses.terms import LossTerms, NextToken


class HiddenNormLoss:
    """Half the squared length of every supervised hidden state."""

    columns: ClassVar[Sequence[Column]] = (Column("hidden_norm"),)

    def __init__(self, terms: Mapping[str, Sequence[HiddenNorm | None]]) -> None:
        self._weights = BySource(each.weight if each else 0.0 for each in terms["norm"])

    def __call__(self, forward: ForwardPass) -> Computed:
        each = forward.supervised_hidden.square().sum(-1) / 2
        total = (forward.coefficients(self._weights) * each).sum()
        return Computed(total, {"norm": total.detach()}, {"hidden_norm": each.detach()})


@dataclass(frozen=True, kw_only=True)
class HiddenNorm(Term):
    computation = HiddenNormLoss
    weight: float = 1.0


@dataclass(frozen=True, kw_only=True)
class WithNorm(LossTerms):
    norm: HiddenNorm | None = None


def by_hand(model: Any, rows: Sequence[Any], label: float, norm: float) -> dict[str, torch.Tensor]:
    total, tokens = torch.zeros((), dtype=torch.float64), 0
    for row in rows:
        ids = torch.tensor(row.input_ids)[None]
        positions = [i for i in range(len(row.input_ids) - 1) if row.supervised[i + 1]]
        hidden = model.model(input_ids=ids).last_hidden_state[0, positions]
        labels = ids[0, [i + 1 for i in positions]]
        total = total + label * cross_entropy(model.lm_head(hidden), labels, reduction="sum")
        total = total + norm * hidden.square().sum() / 2
        tokens += len(positions)
    total = total / tokens
    named = dict(model.named_parameters())
    return dict(zip(named, torch.autograd.grad(total, list(named.values())), strict=True))


@pytest.mark.parametrize(("micro_batch", "pack_to"), [(8, None), (2, None), (8, 40)])
def test_a_term_of_one_file_is_differentiated_and_logged(
    student, step_gradient, tmp_path, micro_batch, pack_to
):
    rows = ragged_rows(8)
    terms = WithNorm(next_token=NextToken(weight=0.5), norm=HiddenNorm(weight=0.2))
    expected = by_hand(student, rows, 0.5, 0.2)
    found = step_gradient(student, [rows], [terms], micro_batch=micro_batch, pack_to=pack_to)
    assert_equal_gradients(found, expected, 2e-5)
    line = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    assert list(line["terms"]) == ["next_token", "norm"]
    source = line["sources"]["0"]
    assert line["terms"]["norm"] == pytest.approx(0.2 * source["hidden_norm"], rel=1e-5)
    assert line["loss"] == pytest.approx(sum(line["terms"].values()))


def test_only_the_sources_that_have_the_term_get_its_gradient(student, step_gradient):
    one, other = ragged_rows(4, 1), ragged_rows(4, 2)
    terms = [WithNorm(norm=HiddenNorm()), WithNorm(next_token=NextToken())]
    found = step_gradient(student, [one, other], terms)
    counts = [sum(sum(row.supervised[1:]) for row in rows) for rows in (one, other)]
    parts = [by_hand(student, one, 0.0, 1.0), by_hand(student, other, 1.0, 0.0)]
    expected = {
        name: sum(n * part[name] for n, part in zip(counts, parts, strict=True)) / sum(counts)
        for name in parts[0]
    }
    assert_equal_gradients(found, expected, 2e-5)


def test_the_objective_says_what_it_needs_and_logs():
    objective = Objective([WithNorm(norm=HiddenNorm()), WithNorm(next_token=NextToken())])
    assert objective.terms == ["next_token", "norm"]
    assert objective.needs == {"labels"}
    assert objective.columns[-1] == "hidden_norm"
    assert not WithNorm(norm=HiddenNorm()).needs_teacher
    with pytest.raises(ValueError, match="at least one term"):
        WithNorm(norm=HiddenNorm(weight=0.0))
