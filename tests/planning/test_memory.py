"""Memory follows the settings as arithmetic says it must."""

from __future__ import annotations

import pytest

from dominie.planning.memory import Memory


def memory(planned, *overrides, **options) -> Memory:
    return planned(*overrides, **options).stages["s"].memory


def test_a_student_trained_in_full_costs_sixteen_bytes_a_weight(planned):
    plan = planned("stages.s.loss={next_token: 1.0}").stages["s"]
    step, weights = plan.memory.phases["optimiser step"], plan.shape.parameters
    assert step == {
        "student weights": 4 * weights,
        "gradients": 4 * weights,
        "optimiser": 8 * weights,
    }


def test_shards_shrink_with_the_ranks(planned):
    two, four = (memory(planned, gpus=n).phases["backward"] for n in (2, 4))
    for item in ("student weights", "gradients", "optimiser"):
        assert four[item] == two[item] / 2
    for item in ("teacher weights", "activations", "attention capture", "gathered layers"):
        assert four[item] == two[item]
    whole = memory(planned, gpus=2, sharded=False).phases["backward"]
    assert whole["optimiser"] == 2 * two["optimiser"]


def test_a_teacher_is_shared_out_where_the_recipe_says_so(planned, models):
    placed = f"models.t={{path: {models / 'teacher'}, placement: sharded}}"
    whole, sharded = (
        [
            memory(planned, placed, f"stages.s.teacher={name}", gpus=n, sharded=False)
            for n in (1, 2, 4)
        ]
        for name in (models / "teacher", "t")
    )
    weights = [m.phases["backward"]["teacher weights"] for m in sharded]
    layers = 4 * planned().stages["s"].teachers[str(models / "teacher")].in_layers
    assert [m.phases["backward"]["teacher weights"] for m in whole] == [weights[0]] * 3
    assert weights[0] - weights[1] == layers / 2
    assert weights[0] - weights[2] == layers * 3 / 4


def test_an_offloaded_teacher_lies_in_the_host_s_memory_but_for_embeddings_and_head(
    planned, models
):
    placed = f"models.t={{path: {models / 'teacher'}, placement: cpu}}"
    found = memory(planned, placed, "stages.s.teacher=t")
    tables = 4 * (2 * 1000 * 64 + 64)
    assert found.phases["backward"]["teacher weights"] == tables
    assert found.host == memory(planned).phases["backward"]["teacher weights"] - tables


def test_what_a_batch_keeps_is_linear_in_its_rows(planned):
    one, two, four = (memory(planned, f"train.micro_batch={n}") for n in (1, 2, 4))
    for item in ("activations", "attention capture", "teacher signal"):
        rows = [m.phases["backward"][item] for m in (one, two, four)]
        assert rows[2] - rows[1] == pytest.approx(2 * (rows[1] - rows[0]), rel=0.01), item


@pytest.mark.parametrize(
    ("less", "more"),
    [
        (["train.max_length=64"], ["train.max_length=256"]),
        (["train.micro_batch=2"], ["train.micro_batch=16"]),
        (["train.gradient_checkpointing=true"], []),
        (["train.lora.r=4"], []),
        (["train.lora.r=4"], ["train.lora.r=64"]),
        (["stages.s.loss.attention=0"], []),
        (["stages.s.loss.attention.layers=last"], []),
        (["stages.s.loss={next_token: 1.0}"], ["stages.s.loss={prediction: 1.0}"]),
    ],
)
def test_less_asked_is_less_needed(planned, less, more):
    assert memory(planned, *less).peak < memory(planned, *more).peak


def test_queries_and_keys_of_the_mapped_layers_are_captured(planned):
    every, last = (
        memory(planned, f"stages.s.loss.attention.layers={layers}").phases["backward"]
        for layers in ("all", "{last: 2}")
    )
    tokens, projections = 8 * 128, (4 + 2) * 16
    assert every["attention capture"] == 6 * tokens * projections * 4
    assert last["attention capture"] == 2 * tokens * projections * 4


def test_a_frozen_teacher_has_its_dtype_and_nothing_else(planned, models):
    half = memory(
        planned, f"models.t={{path: {models / 'teacher'}, dtype: bf16}}", "stages.s.teacher=t"
    )
    full = memory(planned)
    assert (
        full.phases["backward"]["teacher weights"] == 2 * half.phases["backward"]["teacher weights"]
    )


def test_half_precision_casts_every_matrix_once(planned):
    found = planned("train.precision=bf16", "stages.s.loss={next_token: 1.0}").stages["s"]
    layers = found.shape.parameters - 2 * 1000 * 64  # the head is cast by the losses, tables never
    assert found.memory.traced.casts == pytest.approx(2 * layers, rel=0.01)
    assert found.memory.traced.kept_casts == found.memory.traced.casts
    again = memory(planned, "train.precision=bf16", "train.gradient_checkpointing=true").traced
    assert again.kept_casts < 0.01 * found.memory.traced.casts  # each layer's go with its pass


def test_minds_over_one_base_have_no_weights_of_their_own(planned, models):
    student = models / "student"
    overrides = [
        "train.lora={r: 4, merge: false}",
        f"stages.e={{student: {student}, data: {{all: 1.0}}, loss: {{next_token: 1.0}}}}",
        "stages.s.teacher=e",
        "stages.s.loss={prediction: 1.0}",
    ]
    plan = planned(*overrides)
    adapter = plan.stages["e"].memory.traced.trainable
    assert plan.stages["s"].memory.items["teacher weights"] == 4 * adapter
    merged = planned(*overrides, "stages.e.train.lora={r: 4, merge: true}").stages["s"]
    assert merged.memory.items["teacher weights"] == 4 * merged.shape.parameters
