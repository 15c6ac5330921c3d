"""The router term through the real trainer: the oracle's gradient, whatever the layout."""

from __future__ import annotations

import json
import logging
from copy import deepcopy
from typing import Any

import pytest
import torch
from gradients import assert_equal_gradients, ragged_rows, weighted
from peft import LoraConfig, get_peft_model
from transformers import MixtralConfig, Qwen3MoeConfig, set_seed
from transformers.models.mixtral import MixtralForCausalLM
from transformers.models.qwen3_moe import Qwen3MoeForCausalLM

from dominie.core.errors import InputError
from dominie.data.batch import collate
from dominie.losses.objective import Objective
from dominie.losses.terms import Attention, LossTerms, NextToken, Prediction, Router
from dominie.teachers import LocalTeacher, RoutedTeacher
from dominie.training.loss_forward import DistillationInputs, loss_in_forward
from dominie.training.monitoring import ExpertCollapseWarning

SIZES = {
    "vocab_size": 61,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "num_experts_per_tok": 2,
    "experts_implementation": "eager",
}
#: transformers' gates take their softmax in fp32, whatever the model's dtype.
GATE = 1e-5
TERMS = LossTerms(next_token=NextToken(weight=0.5), router=Router(weight=0.7, z_weight=0.3))


@pytest.fixture(params=["mixtral", "qwen3_moe"])
def mixture(request: pytest.FixtureRequest) -> Any:
    set_seed(3)
    if request.param == "mixtral":
        config = MixtralConfig(**SIZES, intermediate_size=24, num_local_experts=3)
        return MixtralForCausalLM(config).double()
    config = Qwen3MoeConfig(
        **SIZES, head_dim=4, moe_intermediate_size=24, num_experts=4, norm_topk_prob=True
    )
    model = Qwen3MoeForCausalLM(config).double()
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.mlp.gate.weight, std=0.5)
    return model


def naive_gradient(model: Any, rows: Any) -> dict[str, torch.Tensor]:
    """One conversation at a time, by transformers' own router logits."""
    model = deepcopy(model).eval()
    total, tokens = torch.zeros((), dtype=torch.float64), 0
    for row in rows:
        ids = torch.tensor(row.input_ids)[None]
        positions = [i for i in range(len(row.input_ids) - 1) if row.supervised[i + 1]]
        tokens += len(positions)
        own = torch.as_tensor(getattr(row, "weights", None) or [1.0] * len(row.input_ids)).double()
        own = own[[i + 1 for i in positions]]
        out = model(input_ids=ids, output_router_logits=True, use_cache=False)
        labels = ids[0, [i + 1 for i in positions]]
        logs = out.logits[0, positions].log_softmax(-1)
        total = total - 0.5 * (own * logs[torch.arange(len(positions)), labels]).sum()
        for logits in out.router_logits:
            count = logits.shape[-1]
            chosen = torch.zeros_like(logits).scatter(1, logits.topk(2).indices, 0.5)
            balance = count * (chosen.mean(0) * logits.softmax(-1).mean(0)).sum()
            z = (logits.logsumexp(-1) ** 2).mean()
            total = total + own.sum() * (0.7 * balance + 0.3 * z) / len(out.router_logits)
    (total / tokens).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_the_gradient_is_that_of_the_formulas(mixture, step_gradient):
    rows = ragged_rows(8)
    found = step_gradient(mixture, [rows], [TERMS])
    assert_equal_gradients(found, naive_gradient(mixture, rows), GATE)


@pytest.mark.parametrize("pack_to", [None, 40])
def test_a_conversation_counts_as_the_weights_of_its_tokens(mixture, step_gradient, pack_to):
    rows = weighted(ragged_rows(8), 5)
    found = step_gradient(mixture, [rows], [TERMS], micro_batch=4, pack_to=pack_to)
    assert_equal_gradients(found, naive_gradient(mixture, rows), GATE)


@pytest.mark.parametrize(("micro_batch", "pack_to"), [(1, None), (2, None), (8, 30), (4, 64)])
def test_layout_does_not_change_the_gradient(mixture, step_gradient, micro_batch, pack_to):
    rows = ragged_rows(8)
    whole = step_gradient(mixture, [rows], [TERMS])
    found = step_gradient(mixture, [rows], [TERMS], micro_batch=micro_batch, pack_to=pack_to)
    assert_equal_gradients(found, whole, GATE)


def test_recomputed_layers_do_not_count_twice(mixture, step_gradient):
    rows = ragged_rows(8)
    plain = step_gradient(mixture, [rows], [TERMS], pack_to=40)
    again = step_gradient(mixture, [rows], [TERMS], pack_to=40, gradient_checkpointing=True)
    assert_equal_gradients(again, plain, GATE)


def test_each_source_has_its_own_weight(mixture, step_gradient):
    general, domain = ragged_rows(4, 1), ragged_rows(4, 2)
    plain = LossTerms(next_token=NextToken(weight=0.5))
    found = step_gradient(mixture, [general, domain], [TERMS, plain], pack_to=64)
    counts = [sum(sum(r.supervised[1:]) for r in rows) for rows in (general, domain)]
    parts = [
        step_gradient(mixture, [rows], [terms], micro_batch=4)
        for rows, terms in ((general, TERMS), (domain, plain))
    ]
    expected = {
        name: sum(c * part[name] for c, part in zip(counts, parts, strict=True)) / sum(counts)
        for name in parts[0]
    }
    assert_equal_gradients(found, expected, GATE)


def test_load_and_entropy_are_logged(mixture, step_gradient, tmp_path):
    step_gradient(mixture, [ragged_rows(8)], [TERMS], micro_batch=2)
    (line,) = [
        json.loads(text)
        for text in (tmp_path / "metrics.jsonl").read_text().splitlines()
        if "terms" in json.loads(text)
    ]
    assert set(line["terms"]) == {"next_token", "router"}
    assert line["loss"] == pytest.approx(sum(line["terms"].values()))
    router = line["router"]
    experts = 3 if "Mixtral" in type(mixture).__name__ else 4
    assert [len(load) for load in router["load"]] == [experts, experts]
    assert all(sum(load) == pytest.approx(1, abs=1e-3) for load in router["load"])
    assert all(0 < entropy < torch.tensor(experts).log() for entropy in router["entropy"])


def test_a_student_without_a_router_is_refused(student):
    with (
        pytest.raises(InputError, match="the student no router"),
        loss_in_forward(student, Objective([TERMS])),
    ):
        pass


def test_top_two_of_two_leaves_load_balancing_out(step_gradient):
    set_seed(4)
    model = MixtralForCausalLM(MixtralConfig(**SIZES, intermediate_size=24, num_local_experts=2))
    model = model.double()
    rows = ragged_rows(6)
    plain = LossTerms(next_token=NextToken(weight=1.0))
    both = LossTerms(next_token=NextToken(weight=1.0), router=Router(weight=5.0))
    assert_equal_gradients(
        step_gradient(model, [rows], [both], micro_batch=3),
        step_gradient(model, [rows], [plain], micro_batch=3),
    )


def test_a_router_beneath_adapters_is_taught(mixture):
    adapted = get_peft_model(mixture, LoraConfig(target_modules="all-linear", r=2))
    batch = collate([(0, row) for row in ragged_rows(3)])
    with loss_in_forward(adapted, Objective([TERMS])):
        outputs = adapted(inputs=DistillationInputs(batch))
        outputs["loss"].backward()
    assert set(outputs["terms"]) == {"next_token", "router"}
    assert outputs["routing"].shape[0] == 2
    gates = [p for n, p in adapted.named_parameters() if ".gate." in n and p.requires_grad]
    assert gates
    assert any(bool(p.grad.abs().max() > 0) for p in gates)


def test_collapse_is_warned_of_once(caplog):
    watch = ExpertCollapseWarning()
    fine = {"load": [[0.5, 0.5], [0.9, 0.1]], "entropy": [0.6, 0.3]}
    collapsed = {"load": [[0.5, 0.5], [0.99, 0.01]], "entropy": [0.6, 0.1]}
    with caplog.at_level(logging.WARNING):
        watch.look(None, 1)
        for step in range(2, 40):
            watch.look(collapsed, step)
        watch.look(fine, 40)
        assert not caplog.records, "at the beginning a router prefers some, and gets over it"
        for step in (100, 200):
            watch.look(collapsed, step)
        watch.look(fine, 300)
        assert not caplog.records, "a line or two may be of a few tokens"
        for step in range(400, 1000, 100):
            watch.look(collapsed, step)
    (record,) = caplog.records
    assert "expert 1 of layer 1 gets 1 %" in record.getMessage()


@pytest.mark.parametrize("student_is_mixture", [False, True])
def test_a_mixture_teaches_predictions_and_attention(
    student, teacher_model, step_gradient, student_is_mixture
):
    """The same gradient whether the teacher's experts are fused or run one by one."""
    if student_is_mixture:
        set_seed(5)
        config = MixtralConfig(**SIZES, intermediate_size=24, num_local_experts=2)
        student = MixtralForCausalLM(config).double()
    terms = LossTerms(prediction=Prediction(), attention=Attention(weight=2.0))
    rows = ragged_rows(6)
    found = {}
    for implementation in ("eager", "batched_mm"):
        teacher_model.set_experts_implementation(implementation)
        teacher = RoutedTeacher({"t": LocalTeacher(teacher_model, attention_layers=[0, 1])}, ["t"])
        found[implementation] = step_gradient(
            student,
            [rows],
            [terms],
            teacher=teacher,
            pairs=[(0, 0), (1, 1)],
            pack_to=40,
            micro_batch=3,
        )
    assert_equal_gradients(found["eager"], found["batched_mm"], rtol=1e-6)
    queries = [g for n, g in found["eager"].items() if "q_proj" in n]
    assert all(bool(gradient.abs().max() > 1e-6) for gradient in queries)
    if student_is_mixture:
        gates = [g for n, g in found["eager"].items() if n.endswith("gate.weight")]
        assert len(gates) == 2
        assert all(bool(gradient.abs().max() > 1e-9) for gradient in gates)
