"""How far a student moves from what it began as, measured in validation while it trains."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from peft import PeftModel
from safetensors.torch import load_file
from tiny import tiny_folder, tiny_model
from transformers import AutoModelForCausalLM, TrainerCallback

from dominie.core.errors import InputError, RunError
from dominie.data.batch import collate
from dominie.data.tokenization import Encoded
from dominie.losses.terms import LossTerms, NextToken, Prediction
from dominie.models.spec import Model
from dominie.toyworld.toy_models import word_tokenizer
from dominie.training.settings import Lora, TrainSettings
from dominie.training.stage_sources import StageSource, StageTraining
from dominie.training.stop_at import StopAt, check_bounds, forgetting_bounds
from dominie.training.train_stage import StageModels, Trained, train_stage
from dominie.training.validation import BasePredictions

KD = LossTerms(prediction=Prediction())
LABELS = LossTerms(next_token=NextToken())


def rows_of(count: int, seed: int) -> list[Encoded]:
    """Rows of many lengths, of which the first tokens are no answer."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        length = int(rng.integers(4, 12))
        rows.append(Encoded(rng.integers(0, 61, length).tolist(), [i > 1 for i in range(length)]))
    return rows


HELD_OUT = {"shop": rows_of(5, seed=2), "general": rows_of(7, seed=3), "watched": rows_of(1, 4)}


class Killed(BaseException):
    """Nothing of the product catches it."""


class KillBefore(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step + 1 == self.step:
            raise Killed


class WeightsAfter(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step, self.weights = step, {}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            state_dict = kwargs["model"].state_dict()
            self.weights = {name: tensor.clone() for name, tensor in state_dict.items()}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Model]:
    """A student whose head is tied to its embedding, one whose head is its own, a teacher."""
    folder, specs = tmp_path_factory.mktemp("models"), {}
    for seed, name in enumerate(("tied", "student", "expert")):
        tiny_folder(folder / name, seed=seed, tie_word_embeddings=name == "tied")
        specs[name] = Model(path=str(folder / name))
    return specs


Train = Callable[..., Trained]


@pytest.fixture
def align(models, tmp_path) -> Train:
    """DAE: an expert on the shop, the model of the start on the rest, one source only watched."""

    def trained(
        name: str = "stage",
        *,
        student: str = "student",
        callbacks: Sequence[TrainerCallback] = (),
        **settings: Any,
    ) -> Trained:
        options = {
            "learning_rate": 3e-3,
            "steps": 4,
            "batch": 4,
            "micro_batch": 2,
            "max_length": 32,
            "checkpoint_every": 1,
            "evaluate_every": 1,
            "log_every": 1,
            "arguments": {"use_cpu": True, "lr_scheduler_type": "constant", "warmup_steps": 0},
        }
        sources = [
            StageSource(
                name="shop", train=rows_of(12, 5), validation=HELD_OUT["shop"], share=0.5,
                terms=KD, teacher="expert",
            ),
            StageSource(
                name="general", train=rows_of(12, 6), validation=HELD_OUT["general"], share=0.5,
                terms=KD, teacher="start", reference=True,
            ),
            StageSource(name="watched", train=(), validation=HELD_OUT["watched"], share=0.0),
        ]  # fmt: skip
        return train_stage(
            StageTraining(
                folder=tmp_path / name,
                sources=sources,
                settings=TrainSettings(**options | {"forgetting": True} | settings),
            ),
            StageModels(
                student=models[student],
                tokenizer=word_tokenizer(),
                teachers={"expert": models["expert"], "start": models[student]},
            ),
            callbacks=callbacks,
        )

    return trained


def stops(forgetting: Any, **more: Any) -> dict[str, Any]:
    return {"stop_at": StopAt(forgetting=forgetting), "steps": 8, "forgetting": False, **more}


def measured(folder: Path) -> list[dict[str, float]]:
    """The figures of each evaluation by source."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [
        {source: values["forgetting"] for source, values in line["evaluation"].items()}
        for line in lines
        if "evaluation" in line
    ]


@torch.no_grad()
def divergence(base: Any, model: Any, rows: Sequence[Encoded]) -> float:
    """KL(base ‖ model) per supervised token in float64: a row at a time, all logits held."""
    total, tokens = 0.0, 0
    for row in rows:
        ids, chosen = torch.tensor([row.input_ids]), torch.tensor(row.supervised[1:])
        ours, theirs = (
            each.double()(input_ids=ids).logits[0, :-1].log_softmax(-1)[chosen]
            for each in (model, base)
        )
        total += float((theirs.exp() * (theirs - ours)).sum())
        tokens += int(chosen.sum())
    return total / tokens


def folder_model(folder: str | Path, base: str) -> Any:
    adapter = (Path(folder) / "adapter_config.json").exists()
    model = AutoModelForCausalLM.from_pretrained(base if adapter else folder).double().eval()
    return PeftModel.from_pretrained(model, folder).double().eval() if adapter else model


FAST = {"learning_rate": 3e-2}
LORA = Lora(r=2, alpha=64, merge=False)
HEAD_TOO = Lora(r=2, alpha=64, target_modules=["q_proj", "lm_head"], merge=False)


@pytest.mark.parametrize(
    ("student", "settings"),
    [
        pytest.param("student", {}, id="packed"),
        pytest.param("tied", {"packing": False}, id="tied, padded", marks=pytest.mark.full),
        pytest.param("student", FAST | {"lora": LORA}, id="lora", marks=pytest.mark.full),
        pytest.param("tied", FAST | {"lora": HEAD_TOO}, id="adapter on a tied head"),
    ],
)
def test_it_is_the_divergence_from_the_start_in_float64(align, models, tmp_path, student, settings):
    align(student=student, **settings)
    found = measured(tmp_path / "stage")
    assert len(found) == 4
    start = models[student].path
    base, model = folder_model(start, start), folder_model(tmp_path / "stage" / "model", start)
    for source, rows in HELD_OUT.items():
        expected = divergence(base, model, rows)
        assert expected > 1e-3
        assert found[-1][source] == pytest.approx(expected, rel=2e-3), source
    assert found[0]["shop"] < found[-1]["shop"], "it moves on"


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({}, id="fp32", marks=pytest.mark.full),
        pytest.param({"precision": "bf16"}, id="bf16"),
        pytest.param({"lora": LORA}, id="lora", marks=pytest.mark.full),
    ],
)
def test_what_has_not_moved_has_forgotten_nothing_to_the_last_bit(align, tmp_path, settings):
    align(learning_rate=0.0, steps=2, **settings)
    nothing = dict.fromkeys(HELD_OUT, 0.0)
    assert measured(tmp_path / "stage") == [nothing, nothing]


@pytest.mark.full
def test_measuring_changes_no_weight_and_no_other_figure(align, tmp_path):
    for name, on in (("on", True), ("off", False)):
        align(name, forgetting=on)
    on, off = (load_file(tmp_path / n / "model" / "model.safetensors") for n in ("on", "off"))
    assert all(torch.equal(on[key], off[key]) for key in on)

    def others(name: str) -> list[dict[str, Any]]:
        lines = map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines())
        figures = [line["evaluation"] for line in lines if "evaluation" in line]
        assert all(("forgetting" in v) == (name == "on") for f in figures for v in f.values())
        return [
            {source: {k: n for k, n in v.items() if k != "forgetting"} for source, v in f.items()}
            for f in figures
        ]

    assert others("on") == others("off")


@pytest.mark.parametrize(
    "lora", [pytest.param(None, id="whole", marks=pytest.mark.full), pytest.param(LORA, id="lora")]
)
def test_a_stage_that_goes_on_compares_with_its_start_and_not_with_its_checkpoint(
    align, tmp_path, lora
):
    align("whole", lora=lora)
    with pytest.raises(Killed):
        align("cut", lora=lora, callbacks=[KillBefore(3)])
    align("cut", lora=lora)
    assert measured(tmp_path / "cut") == measured(tmp_path / "whole")


def test_no_more_is_kept_than_the_states_of_supervised_positions():
    """Of a frozen head nothing, of one that is trained a copy."""
    batch = collate([(0, row) for row in HELD_OUT["general"]])
    model, accelerator = tiny_model(), Accelerator(cpu=True)
    tokens = int(batch.supervised.sum())
    for trained in (True, False):
        model.requires_grad_(trained)
        base = BasePredictions(model, [batch, batch], accelerator)
        assert base.bytes == 2 * tokens * 16 * 4
        head = base.head(torch.device("cpu"))
        shared = head.weight.data_ptr() == model.lm_head.weight.data_ptr()
        assert shared != trained
        assert model.training, "as it was"
        with torch.no_grad():
            before = base.target(1, head).head.weight.clone()
            model.lm_head.weight += 1.0 if trained else 0.0
        assert torch.equal(base.target(1, head).head.weight, before)
    assert dataclasses.is_dataclass(base.target(0, head))


def test_a_stage_ends_where_it_has_moved_too_far_and_keeps_the_model_before(align, tmp_path):
    fifth = WeightsAfter(5)
    align("free", steps=8, callbacks=[fifth])
    moved = [each["general"] for each in measured(tmp_path / "free")]
    bound = (moved[4] + moved[5]) / 2
    assert max(moved[:5]) < bound < moved[5], "it crosses the bound at the sixth step"
    done = align(**stops({"general": bound}))
    assert done.steps == 6
    assert done.stopped is not None
    assert {**done.stopped, "why": ""} == {
        "step": 6, "source": "general", "forgetting": moved[5], "bound": bound,
        "kept_step": 5, "why": "",
    }  # fmt: skip
    assert "at step 6 of 8; the model of step 5 is kept" in done.stopped["why"]
    assert done.final["evaluation"]["general"]["forgetting"] == moved[4], "of what is kept"
    assert measured(tmp_path / "stage") == measured(tmp_path / "free")[:6]
    kept = load_file(tmp_path / "stage" / "model" / "model.safetensors")
    assert all(torch.equal(kept[key], fifth.weights[key]) for key in kept)

    with pytest.raises(Killed):
        align("cut", **stops({"general": bound}), callbacks=[KillBefore(5)])
    again = align("cut", **stops({"general": bound}))
    assert dataclasses.replace(again, seconds=0) == dataclasses.replace(done, seconds=0)
    ours = load_file(tmp_path / "cut" / "model" / "model.safetensors")
    assert all(torch.equal(ours[key], kept[key]) for key in kept)


@pytest.mark.full
def test_a_stage_within_its_bounds_ends_as_without_them(align, tmp_path):
    free, bounded = align("free", steps=3), align(**stops(1e3, steps=3))
    assert bounded.stopped is None
    assert bounded.steps == free.steps == 3
    one, two = (load_file(tmp_path / n / "model/model.safetensors") for n in ("free", "stage"))
    assert all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.full
def test_of_the_models_before_the_bound_the_best_is_kept_if_that_is_asked_for(align, tmp_path):
    align("free", steps=8, keep="best")
    lines = map(json.loads, (tmp_path / "free" / "metrics.jsonl").read_text().splitlines())
    losses = [line["loss"] for line in lines if "evaluation" in line]
    moved = [each["shop"] for each in measured(tmp_path / "free")]
    bound = (moved[4] + moved[5]) / 2
    done = align(**stops({"shop": bound}, keep="best"))
    assert done.stopped is not None
    assert done.stopped["kept_step"] == 1 + min(range(5), key=losses.__getitem__)


def test_if_no_evaluation_is_within_the_bound_there_is_nothing_to_keep(align, tmp_path):
    with pytest.raises(RunError, match=r"(?s)step 1: the first.*general 0.*evaluate earlier"):
        align(**stops(1e-9))
    assert not (tmp_path / "stage" / "model").exists()


def source(name: str, *, share: float = 0.0, held_out: int = 1, reference: bool = False) -> Any:
    rows = rows_of(held_out, 0)
    return StageSource(name=name, train=(), validation=rows, share=share, reference=reference)


def test_a_number_bounds_what_is_not_to_be_learnt():
    sources = [
        source("shop", share=0.1),
        source("general", share=0.9, reference=True),
        source("watched"),
        source("whole", held_out=0),
    ]
    assert forgetting_bounds(StopAt(forgetting=0.1), sources) == {"general": 0.1, "watched": 0.1}
    assert forgetting_bounds(StopAt(forgetting={"shop": 2.0}), sources) == {"shop": 2.0}
    assert forgetting_bounds(None, sources) == {}


@pytest.mark.parametrize(
    ("forgetting", "names", "message"),
    [
        (
            0.1,
            ["shop"],
            r"a number bounds.*found +held out and learnt: shop.*name the source, as {shop",
        ),
        (0.1, [], r"a number bounds.*nothing held out"),
        ({"general": 0.1}, ["shop"], r"nothing is held out of general.*set data.general.valid"),
    ],
)
def test_bounds_on_nothing_are_refused(forgetting, names, message):
    sources = [source(name, share=0.5) for name in names]
    with pytest.raises(InputError, match=f"(?s){message}"):
        check_bounds(StopAt(forgetting=forgetting), sources, unknown=(), where="r.yaml: train")
    check_bounds(StopAt(forgetting=forgetting), sources, unknown={"general"}, where="")


@pytest.mark.parametrize("forgetting", [0.0, -1.0, float("inf"), {}, {"general": 0.0}])
def test_a_bound_is_positive(forgetting):
    with pytest.raises(ValueError, match=r"forgetting.*(positive and finite|names no source)"):
        StopAt(forgetting=forgetting)
