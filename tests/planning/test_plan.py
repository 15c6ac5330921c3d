"""What fits and what does not, what would, and what it costs."""

from __future__ import annotations

import pytest

from dominie.core.errors import InputError
from dominie.core.hardware import GPUS
from dominie.planning.plan import machine


def test_a_stage_fits_where_its_peak_does(planned):
    peak = planned().stages["s"].peak / 1e9
    assert planned(memory=peak * 1.001).fits
    tight = planned(memory=peak * 0.999)
    assert not tight.fits
    assert tight.stages["s"].fix is not None


@pytest.mark.parametrize("share", [0.95, 0.8, 0.6, 0.45, 0.3])
@pytest.mark.parametrize(
    "start", [[], ["train.precision=bf16", "train.gradient_checkpointing=true"]]
)
def test_the_proposed_fix_fits_when_it_is_planned_again(planned, start, share):
    memory = planned(*start).stages["s"].peak / 1e9 * share
    fix = planned(*start, memory=memory).stages["s"].fix
    assert fix is not None
    options = [how for how in fix.how if how.startswith("--")]
    assert all(option.startswith("--gpus ") for option in options)
    gpus = int(options[0].split()[1]) if options else None
    overrides = [how for how in fix.how if not how.startswith("--")]
    again = planned(*start, *overrides, memory=memory, gpus=gpus)
    assert again.fits
    assert again.stages["s"].peak == pytest.approx(fix.peak)


def test_a_smaller_micro_batch_is_tried_before_adapters(planned):
    peak = planned().stages["s"].peak / 1e9
    fix = planned(memory=peak * 0.9).stages["s"].fix
    assert fix is not None
    assert fix.how == ("stages.s.train.micro_batch=4",)


def test_what_nothing_makes_fit_has_no_fix(planned):
    stage = planned(memory=1e-5).stages["s"]
    assert stage.fix is None
    assert stage.measures
    assert min(peak for _, peak in stage.measures) > 1e4


def test_predictions_of_the_start_are_kept_in_the_host_s_memory(planned):
    held_out = "data.all={path: nowhere.jsonl, validation_fraction: 0.1}"
    options = {"tokens": 32, "gpus": 2}
    off, on = (
        planned(held_out, f"train.forgetting={on}", **options).stages["s"].memory
        for on in ("false", "true")
    )
    assert on.peak == off.peak
    states, head = 100 * 32, 1000  # a tenth of the conversations
    assert on.host - off.host == (states + head) * 64 * 4 / 2
    on_cpu = planned(held_out, "train.forgetting=true", tokens=32, gpu=None).stages["s"].memory
    assert on_cpu.items["base predictions"] == (states + head) * 64 * 4


def test_hours_shrink_with_devices_and_grow_with_tokens(planned):
    hours = {
        (gpus, tokens): planned(gpus=gpus, tokens=tokens).stages["s"].cost.seconds["compute"]
        for gpus, tokens in ((1, 32), (2, 32), (1, 64))
    }
    assert hours[2, 32] == pytest.approx(hours[1, 32] / 2)
    assert 2 * hours[1, 32] <= hours[1, 64] < 3 * hours[1, 32]  # attention grows with the length


def test_a_dense_model_takes_six_flops_a_weight_and_token(planned):
    stage = planned("stages.s.loss={next_token: 1.0}", "train.max_length=2").stages["s"]
    weights = stage.shape.parameters - 1000 * 64  # a table is looked up, not multiplied
    assert stage.cost.student_flops == pytest.approx(6 * weights, rel=0.01)
    assert stage.cost.teacher_flops == 0
    repeated = planned(
        "stages.s.loss={next_token: 1.0}",
        "train.max_length=2",
        "train.gradient_checkpointing=true",
    ).stages["s"]
    assert repeated.cost.student_flops == pytest.approx(8 * weights, rel=0.01)


def test_money_is_hours_times_devices_times_price(planned):
    stage = planned(gpus=2, price=3.0).stages["s"]
    assert stage.money == pytest.approx(stage.cost.hours * 6)
    assert planned().stages["s"].money is None


def test_a_cached_teacher_costs_what_is_read_and_must_fit_while_it_writes(planned):
    loss = "stages.s.loss={prediction: 1.0}"
    live, cached = (
        planned(loss, f"stages.s.cache={word}").stages["s"] for word in ("false", "true")
    )
    assert "teacher weights" not in cached.memory.phases["backward"]
    assert cached.peak < live.peak
    assert cached.cost.teacher_flops == 0 < live.cost.teacher_flops
    writing = cached.memory.totals["writing the cache"]
    assert writing > 4 * next(iter(cached.teachers.values())).parameters


def test_merged_models_cost_their_weights(planned, models):
    student = models / "student"
    merge = f"stages.m={{merge: {{models: {{s: 1.0, {student}: 1.0}}}}}}"
    plan = planned(merge)
    assert plan.stages["m"].kind == "merge"
    assert plan.stages["m"].peak == 4 * plan.stages["s"].shape.parameters
    assert plan.stages["m"].cost is None


def test_an_upcycled_student_is_planned_as_the_mixture_it_becomes(planned, models):
    student = models / "student"
    plan = planned(
        f"stages.u={{upcycle: {{model: {student}, experts: 2}}}}",
        "stages.s.student=u",
        "stages.s.loss={next_token: 1.0}",
    )
    dense = planned().stages["s"].shape.parameters
    experts, routers = 6 * 3 * 64 * 128, 6 * 2 * 64
    assert plan.stages["u"].kind == "upcycle"
    assert plan.stages["s"].shape.parameters == dense + experts + routers


@pytest.mark.parametrize("name", GPUS)
def test_every_gpu_of_the_table_says_where_it_is_from(name):
    gpu = GPUS[name]
    assert gpu.source
    assert gpu.half > gpu.single > 1e13
    assert 20 <= gpu.memory <= 200
    assert machine(gpu=name.upper()).memory == gpu.memory * 1e9


@pytest.mark.parametrize(
    ("options", "where"),
    [
        ({"gpu": "h1000"}, "--gpu"),
        ({"memory": 0}, "--memory"),
        ({"memory": float("nan")}, "--memory"),
        ({"gpus": 0}, "--gpus"),
        ({"price": -1.0}, "--price"),
        ({"efficiency": 1.5}, "--efficiency"),
    ],
)
def test_options_that_are_none_are_refused_by_name(options, where):
    with pytest.raises(InputError, match=where):
        machine(**options)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"gpus": 8}, "h100"),
        ({"gpus": 8, "memory": 80}, "h100"),
        ({"memory": 141}, "h200"),
        ({"gpus": 2, "memory": 45}, "l40s"),
        ({"memory": 1e6}, "mi300x"),
        ({"gpu": "a100", "memory": 141}, "a100"),
    ],
)
def test_numbers_speak_of_a_gpu(options, name):
    assert machine(**options).device.name == name


def test_without_a_word_it_is_this_machine(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert machine().device.is_cpu
    assert machine(memory=2).device.is_cpu
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "NVIDIA H200 NVL")
    assert machine().device.name == "h200"


def test_a_batch_that_the_ranks_cannot_share_is_refused(planned):
    with pytest.raises(InputError, match="batch"):
        planned(gpus=3)


def test_a_model_without_configuration_is_named_with_what_to_do(planned, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError) as refused:
        planned("stages.s.student=nobody/nothing")
    assert refused.value.where == "nobody/nothing"
    assert "config.json" in str(refused.value.do)
    assert "mistralai/Mistral-7B-v0.1" in str(refused.value.expected)
