"""Student, reference and expert over one base: equal to three full models in all but memory."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny import tiny_folder
from transformers import AutoModelForCausalLM, TrainerCallback, set_seed

from dominie.core.errors import InputError
from dominie.data.tokenization import Encoded
from dominie.losses.terms import Attention, LossTerms, NextToken, Prediction
from dominie.models.adapters import SharedBase, shared_base
from dominie.models.info import describe
from dominie.models.loading import load_frozen, load_student
from dominie.models.spec import Model
from dominie.teachers import AdapterTeacher, LocalTeacher, RoutedTeacher
from dominie.toyworld.toy_models import word_tokenizer
from dominie.training import train_stage as stage_module
from dominie.training.settings import Lora, TrainSettings
from dominie.training.stage_sources import StageSource, StageTraining
from dominie.training.train_stage import StageModels, train_stage

LORA = {"r": 3, "alpha": 6}
LABELS = LossTerms(next_token=NextToken())
PREDICTION = LossTerms(prediction=Prediction(temperature=2.0))
WITH_ATTENTION = LossTerms(prediction=Prediction(), attention=Attention(weight=2.0))


def rows(count: int, seed: int) -> list[Encoded]:
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        ids = rng.integers(0, 61, int(rng.integers(4, 12))).tolist()
        made.append(Encoded(ids, [i > 0 for i in range(len(ids))]))
    return made


def settings(**changes: Any) -> TrainSettings:
    options = {
        "steps": 3,
        "batch": 8,
        "micro_batch": 4,
        "max_length": 32,
        "learning_rate": 1e-2,
        "log_every": 1,
        "checkpoint_every": 1,
        "arguments": {"use_cpu": True, "lr_scheduler_type": "constant", "warmup_steps": 0},
        "lora": Lora(**LORA, merge=False),
    }
    return TrainSettings(**options | changes)


def tuned(folder: Path, student: Model, seed: int, **changes: Any) -> Model:
    """A model tuned on labels, in `folder/model`."""
    source = StageSource(name="rows", train=rows(24, seed), validation=(), share=1.0, terms=LABELS)
    train_stage(
        StageTraining(
            folder=folder,
            sources=[source],
            settings=settings(learning_rate=5e-2, steps=8, **changes),
        ),
        StageModels(student=student, tokenizer=word_tokenizer(), teachers={}),
    )
    return Model(path=str(folder / "model"))


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Model]:
    """A base, a reference and an expert over it, the expert begun as the reference."""
    folder = tmp_path_factory.mktemp("adapters")
    tiny_folder(folder / "base", initializer_range=0.2)
    base = Model(path=str(folder / "base"))
    reference = tuned(folder / "reference", base, seed=1)
    expert = tuned(folder / "expert", reference, seed=2)
    return {"base": base, "reference": reference, "expert": expert}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(8)[None]).logits


def test_an_adapter_trained_on_is_an_adapter_over_the_same_base(models, tmp_path):
    config = json.loads((Path(models["expert"].path) / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == models["base"].path
    assert (Path(models["expert"].path) / "base_model.json").is_file()
    told = []

    class Keep(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            told.append(logits(kwargs["model"]))
            kwargs["model"].train()

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            told.append(logits(kwargs["model"]))

    source = StageSource(name="rows", train=rows(24, 5), validation=(), share=1.0, terms=LABELS)
    train_stage(
        StageTraining(folder=tmp_path / "on", sources=[source], settings=settings()),
        StageModels(student=models["reference"], tokenizer=word_tokenizer(), teachers={}),
        callbacks=[Keep()],
    )
    began, ended = told
    close = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(began, logits(load_frozen(models["reference"])), **close)
    torch.testing.assert_close(
        ended, logits(load_frozen(Model(path=str(tmp_path / "on" / "model")))), **close
    )
    assert float((ended - began).abs().max()) > 1e-2


def test_an_adapter_of_another_shape_is_refused(models):
    with pytest.raises(InputError, match=r"(?s)another shape.*r 4.*r 3.*merge: true"):
        load_student(models["reference"], lora=Lora(r=4, alpha=6, merge=False))
    load_student(models["reference"], lora=Lora(r=4, alpha=6))  # over the merged weights


@pytest.mark.parametrize(
    ("student", "merge", "teachers", "shared"),
    [
        ("base", True, ["base", "reference", "expert"], [None, "reference", "expert"]),
        ("reference", False, ["base", "reference", "expert"], [None, "reference", "expert"]),
        ("reference", True, ["reference"], [None]),
    ],
)
def test_who_shares_the_base(models, student, merge, teachers, shared):
    found = shared_base(
        describe(models[student]),
        {name: describe(models[name]) for name in teachers},
        lora=Lora(**LORA, merge=merge),
        precision="fp32",
    )
    expected = [name and models[name].path for name in shared]
    assert found.adapters == dict(zip(teachers, expected, strict=True))
    assert not found.apart


def test_who_does_not_share_the_base_and_why(models, tmp_path):
    lora = Lora(**LORA)

    def apart(student: Model, teacher: Model, precision: str = "fp32") -> dict[str, str]:
        found = shared_base(
            describe(student), {"t": describe(teacher)}, lora=lora, precision=precision
        )
        assert not found.adapters
        return dict(found.apart)

    base, reference, expert = models["base"], models["reference"], models["expert"]
    assert "lacks" in apart(reference, base)["t"]
    assert "lacks" in apart(reference, expert)["t"]
    assert "fp32, the base's bf16" in apart(base, expert, precision="bf16")["t"]
    assert "attention" in apart(base, Model(path=base.path, attention="eager"))["t"]
    odd = tmp_path / "odd"
    odd.mkdir()
    config = json.loads((Path(expert.path) / "adapter_config.json").read_text())
    (odd / "adapter_config.json").write_text(json.dumps({**config, "bias": "all"}))
    assert "no plain LoRA" in apart(base, Model(path=str(odd)))["t"]
    other = tmp_path / "other"
    AutoModelForCausalLM.from_pretrained(base.path).save_pretrained(other)
    assert apart(base, Model(path=str(other))) == {}, "another base"
    alone = describe(base)
    whole = shared_base(alone, {"t": alone}, lora=None, precision="fp32")
    assert not whole.adapters, "a student whose every weight is trained holds no base"


def dae(folder: Path, models: dict[str, Model], terms: LossTerms, **changes: Any) -> Any:
    """The alignment stage; general rows by the base, domain rows by the expert."""
    sources = [
        StageSource(
            name="general",
            train=rows(24, 3),
            validation=rows(6, 8),
            share=0.5,
            terms=terms,
            teacher="base",
        ),
        StageSource(
            name="domain",
            train=rows(24, 4),
            validation=rows(6, 9),
            share=0.5,
            terms=terms,
            teacher="expert",
        ),
    ]
    return train_stage(
        StageTraining(
            folder=folder, sources=sources, settings=settings(evaluate_every=1, **changes)
        ),
        StageModels(
            student=models["reference"],
            tokenizer=word_tokenizer(),
            teachers={"base": models["base"], "expert": models["expert"]},
        ),
    )


def lines(folder: Path) -> Iterator[dict[str, Any]]:
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        yield {
            k: v
            for k, v in record.items()
            if k not in {"seconds", "tokens_per_second", "throughput"}
        }


@pytest.mark.parametrize("terms", [PREDICTION, WITH_ATTENTION], ids=["prediction", "attention"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("merge", [False, True])
def test_a_stage_learns_the_same_over_one_base(
    models, tmp_path, monkeypatch, terms, checkpointing, merge
):
    """Dropout falls on the student alone, whose draws the teachers do not disturb."""
    if merge:  # then only the base's own student shares it
        models = {**models, "reference": models["base"]}
    changes = {
        "lora": Lora(**LORA, dropout=0.3, merge=merge),
        "gradient_checkpointing": checkpointing,
    }
    one = dae(tmp_path / "one", models, terms, **changes)
    seen: list[Any] = []
    monkeypatch.setattr(
        stage_module, "shared_base", lambda *_, **__: seen.append(1) or SharedBase({}, {})
    )
    three = dae(tmp_path / "three", models, terms, **changes)
    assert seen
    assert (one.parameters, one.trainable_parameters) == (
        three.parameters,
        three.trainable_parameters,
    )
    for mine, theirs in zip(lines(tmp_path / "one"), lines(tmp_path / "three"), strict=True):
        assert json.dumps(mine).count(":") == json.dumps(theirs).count(":")
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
        if "terms" in mine:
            assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)
    name = "model.safetensors" if merge else "adapter_model.safetensors"
    mine, theirs = (load_file(tmp_path / x / "model" / name) for x in ("one", "three"))
    assert mine.keys() == theirs.keys()
    for key, tensor in mine.items():
        torch.testing.assert_close(tensor, theirs[key], rtol=1e-2, atol=2e-4)
    assert {p.name for p in (tmp_path / "one" / "model").iterdir() if p.is_dir()} == set()


def test_a_stage_over_one_base_resumes_with_the_student_alone(models, tmp_path):
    class Crash(Exception):
        pass

    class AtStep(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 2:
                raise Crash

    dae(tmp_path / "whole", models, PREDICTION)
    teachers = {"base": models["base"], "expert": models["expert"]}
    common = {"share": 0.5, "terms": PREDICTION}
    general = StageSource(
        name="general", train=rows(24, 3), validation=rows(6, 8), teacher="base", **common
    )
    domain = StageSource(
        name="domain", train=rows(24, 4), validation=rows(6, 9), teacher="expert", **common
    )
    with pytest.raises(Crash):
        train_stage(
            StageTraining(
                folder=tmp_path / "cut",
                sources=[general, domain],
                settings=settings(evaluate_every=1),
            ),
            StageModels(student=models["reference"], tokenizer=word_tokenizer(), teachers=teachers),
            callbacks=[AtStep()],
        )
    kept = tmp_path / "cut" / "checkpoints" / "checkpoint-2"
    assert (kept / "adapter_model.safetensors").is_file()
    assert not [path for path in kept.iterdir() if path.is_dir()], "no teacher is kept"
    dae(tmp_path / "cut", models, PREDICTION)
    ours = load_file(tmp_path / "cut" / "model" / "adapter_model.safetensors")
    theirs = load_file(tmp_path / "whole" / "model" / "adapter_model.safetensors")
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.parametrize("merge", [True, False])
def test_a_tied_head_under_adapters_resumes_and_is_written_as_it_was_trained(tmp_path, merge):
    base = Model(path=str(tiny_folder(tmp_path / "base", tie_word_embeddings=True)))
    told: dict[int, torch.Tensor] = {}

    class Watch(TrainerCallback):
        def __init__(self, stop_at: int | None = None) -> None:
            self.stop_at = stop_at

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == self.stop_at:
                raise KeyError("killed")

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            told[0] = logits(kwargs["model"])

    def train(folder: Path, stop_at: int | None = None) -> None:
        source = StageSource(name="rows", train=rows(24, 1), validation=(), share=1.0, terms=LABELS)
        lora = Lora(**LORA, modules_to_save=["lm_head", "embed_tokens"], merge=merge)
        train_stage(
            StageTraining(folder=folder, sources=[source], settings=settings(lora=lora)),
            StageModels(student=base, tokenizer=word_tokenizer(), teachers={}),
            callbacks=[Watch(stop_at)],
        )

    with pytest.raises(KeyError, match="killed"):
        train(tmp_path / "cut", stop_at=2)
    train(tmp_path / "cut")
    resumed = told.pop(0)
    train(tmp_path / "whole")
    assert torch.equal(resumed, told[0])
    for folder in ("cut", "whole"):
        found = logits(load_frozen(Model(path=str(tmp_path / folder / "model"))))
        torch.testing.assert_close(found, told[0], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(told[0], logits(load_frozen(base)), atol=1e-2)


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "lm_head"]])
@pytest.mark.parametrize("attention", [False, True])
def test_the_gradient_in_float64_is_that_of_three_models(
    models, tmp_path, step_gradient, attention, targets
):
    """The student's weights are not the reference's, or a teacher could be mistaken for it."""
    lora = Lora(**LORA, dropout=0.0, target_modules=targets)
    kept = Lora(**LORA, target_modules=targets, merge=False)
    expert = tuned(tmp_path / "expert", models["base"], seed=6, lora=kept)
    terms = WITH_ATTENTION if attention else PREDICTION
    pairs = [(0, 0), (1, 1)] if attention else []
    layers = [0, 1] if attention else []
    general, domain = rows(4, 3), rows(4, 4)

    def student() -> Any:
        set_seed(7)
        model = load_student(models["base"], lora=lora)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        return model.double()

    apart = RoutedTeacher(
        {
            name: LocalTeacher(load_frozen(spec).double(), attention_layers=layers)
            for name, spec in (("base", models["base"]), ("expert", expert))
        },
        ["base", "expert"],
    )
    options = {"routes": [0, 1], "micro_batch": 4, "pairs": pairs}
    expected = step_gradient(student(), [general, domain], [terms, terms], teacher=apart, **options)
    model = student()
    own = [AdapterTeacher(model, None), AdapterTeacher(model, expert.path)]
    model.double()
    for checkpointing in (False, True):
        for adapter_teacher in own:
            adapter_teacher.capture(layers)
        shared = RoutedTeacher(dict(zip(("base", "expert"), own, strict=True)), ["base", "expert"])
        found = step_gradient(
            model,
            [general, domain],
            [terms, terms],
            teacher=shared,
            gradient_checkpointing=checkpointing,
            **options,
        )
        assert found.keys() == expected.keys()
        assert max(float(g.abs().max()) for g in found.values()) > 1e-3
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-8, msg=name)
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        assert trained == set(expected), "the student alone is trained"
