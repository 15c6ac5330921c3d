"""A stage from rows and models to a folder that transformers loads, whatever interrupts it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tiny import tiny_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    TrainerCallback,
)

from dominie.core.errors import RunError
from dominie.data.tokenization import Encoded
from dominie.losses.terms import Attention, LossTerms, NextToken, Prediction
from dominie.models.info import model_flops
from dominie.toyworld.toy_models import word_tokenizer
from dominie.training.checkpoints import by_step, seal
from dominie.training.settings import Lora, TrainSettings, training_arguments
from dominie.training.stage_sources import StageSource, StageTraining
from dominie.training.train_stage import (
    LoadedModels,
    StageModels,
    Trained,
    build_trainer,
    train_stage,
)

STEPS = 6
KD = LossTerms(prediction=Prediction(), attention=Attention(weight=0.5))


def rows_of(count: int, seed: int) -> list[Encoded]:
    """Rows that count upwards from somewhere, so that there is a rule to learn."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        length, start = int(rng.integers(4, 12)), int(rng.integers(0, 40))
        rows.append(Encoded([start + i for i in range(length)], [i > 1 for i in range(length)]))
    return rows


def noise(count: int, seed: int) -> list[Encoded]:
    rng = np.random.default_rng(seed)
    return [Encoded(rng.integers(0, 61, 8).tolist(), [True] * 8) for _ in range(count)]


Train = Callable[..., Trained]


@pytest.fixture
def train(models, tmp_path) -> Train:
    """Trains in `tmp_path/<name>`."""

    def trained(
        name: str = "stage",
        *,
        rows: Sequence[Encoded] | None = None,
        terms: LossTerms | None = None,
        validation: Sequence[Encoded] = (),
        callbacks: Sequence[TrainerCallback] = (),
        **settings: Any,
    ) -> Trained:
        options = {
            "learning_rate": 1e-2,
            "steps": STEPS,
            "batch": 8,
            "micro_batch": 4,
            "max_length": 32,
            "checkpoint_every": 1,
            "log_every": 1,
            "arguments": {"use_cpu": True, "lr_scheduler_type": "constant", "warmup_steps": 0},
        }
        source = StageSource(
            name="rows",
            train=rows or rows_of(24, seed=1),
            validation=validation,
            share=1.0,
            terms=terms or LossTerms(next_token=NextToken()),
            teacher="teacher" if terms else None,
        )
        return train_stage(
            StageTraining(
                folder=tmp_path / name,
                sources=[source],
                settings=TrainSettings(**options | settings),
            ),
            StageModels(
                student=models["student"],
                tokenizer=word_tokenizer(),
                teachers={"teacher": models["teacher"]} if terms else {},
            ),
            callbacks=callbacks,
        )

    return trained


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


class AtStep(TrainerCallback):
    """Does something to the model before a step."""

    def __init__(self, step: int, act: Callable[[Any], object]) -> None:
        self.step, self.act = step, act

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step + 1 == self.step:
            self.act(kwargs["model"])


class Crash(Exception):
    pass


def crash(_: Any) -> None:
    raise Crash


class CrashAfterLastSave(TrainerCallback):
    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == state.max_steps:
            raise Crash


def test_a_stage_learns_and_accounts_for_what_it_did(train, models, tmp_path):
    done = train(steps=30, checkpoint_every=10)
    lines = [line for line in metrics(tmp_path / "stage") if "terms" in line]
    assert lines[-1]["loss"] < 0.5 * lines[0]["loss"]
    assert done.steps == 30
    assert done.supervised_tokens == lines[-1]["tokens"]
    assert done.token_shares == {"rows": 1.0}
    assert done.parameters == done.trainable_parameters
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "stage" / "model")
    assert model.num_parameters() == done.parameters
    assert AutoTokenizer.from_pretrained(tmp_path / "stage" / "model").chat_template


def test_merged_lora_is_a_plain_model_equal_to_base_and_adapter(train, models, tmp_path):
    lora = {"r": 2, "alpha": 8}
    done = train("merged", lora=Lora(**lora))
    train("adapter", lora=Lora(**lora, merge=False))
    assert 0 < done.trainable_parameters < done.parameters
    merged, adapter = tmp_path / "merged" / "model", tmp_path / "adapter" / "model"
    assert not (merged / "adapter_config.json").exists()
    assert (adapter / "adapter_config.json").is_file()
    assert not (adapter / "model.safetensors").exists()
    base = AutoModelForCausalLM.from_pretrained(models["student"].path)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    together = PeftModel.from_pretrained(base, adapter).merge_and_unload().state_dict()
    plain = AutoModelForCausalLM.from_pretrained(merged).state_dict()
    assert together.keys() == plain.keys()
    for name, tensor in plain.items():
        torch.testing.assert_close(tensor, together[name])
    moved = [name for name in plain if not torch.equal(plain[name], before[name])]
    assert moved
    assert all("proj" in name for name in moved)


def test_bf16_is_written_in_bf16_and_trained_in_fp32(train, tmp_path):
    seen: set[torch.dtype] = set()

    class Dtypes(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen.update(p.dtype for p in kwargs["model"].parameters())

    train(precision="bf16", callbacks=[Dtypes()])
    assert seen == {torch.float32}
    assert {t.dtype for t in weights(tmp_path / "stage" / "model").values()} == {torch.bfloat16}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "stage" / "model")
    assert model.dtype == torch.bfloat16
    lines = [line for line in metrics(tmp_path / "stage") if "terms" in line]
    assert lines[-1]["loss"] < lines[0]["loss"]


def test_a_model_that_is_trained_again_is_trained_in_the_precision_asked_for(tmp_path):
    """accelerate puts autocast around a model once, which the first trainer takes away again."""
    student, dtypes = tiny_model(), []
    (tmp_path / "stage").mkdir()
    student.model.layers[0].mlp.gate_proj.register_forward_hook(
        lambda module, inputs, output: dtypes.append(output.dtype)
    )
    for precision in ("bf16", "fp32", "bf16"):
        settings = TrainSettings(precision=precision, batch=2, micro_batch=2, steps=1)
        source = StageSource(
            name="a",
            train=noise(2, seed=1),
            validation=[],
            share=1.0,
            terms=LossTerms(next_token=NextToken()),
        )
        stage = StageTraining(folder=tmp_path / "stage", sources=[source], settings=settings)
        arguments = training_arguments(settings, tmp_path / "checkpoints", steps=1, ranks=1)
        models = LoadedModels(student=student, flops=model_flops(student))
        with build_trainer(stage, models, arguments) as trainer:
            trainer.resume(None)
        assert not {"forward", "_original_forward"} & vars(student).keys()
    assert dtypes == [torch.bfloat16, torch.float32, torch.bfloat16]


def test_the_best_model_is_kept_and_patience_ends_the_stage(train, tmp_path):
    """Learning the rule makes noise less probable, so that validation gets worse from the start."""
    folder = tmp_path / "stage"
    validation = noise(8, seed=3)
    done = train(steps=40, validation=validation, keep="best", patience=3, evaluate_every=1)
    losses = {line["step"]: line["loss"] for line in metrics(folder) if "evaluation" in line}
    best = min(losses, key=losses.__getitem__)
    assert done.steps == max(losses) == best + 3 < 40
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    total = tokens = 0.0
    for row in validation:
        ids = torch.tensor([row.input_ids])
        with torch.no_grad():
            total += float(model(input_ids=ids, labels=ids).loss) * (len(row.input_ids) - 1)
        tokens += len(row.input_ids) - 1
    assert total / tokens == pytest.approx(losses[best], rel=1e-4)


#: The best step comes early: noise is held out, which becomes less probable with every step.
def test_how_often_is_validated_changes_no_weight(train, tmp_path):
    """The attention term draws rows and layers, of validation apart from those of training."""
    sampled = Attention(row_fraction=0.5, layer_fraction=0.5)
    terms = LossTerms(prediction=Prediction(), attention=sampled)
    options = {"terms": terms, "validation": rows_of(6, seed=2)}
    train("often", evaluate_every=1, **options)
    train("once", evaluate_every=STEPS, **options)
    train("few", evaluate_every=2, evaluate_rows=2, **options)
    often, once, few = (weights(tmp_path / name / "model") for name in ("often", "once", "few"))
    assert all(torch.equal(often[key], once[key]) for key in once)
    assert all(torch.equal(few[key], once[key]) for key in once)
    last = [metrics(tmp_path / name)[-1]["evaluation"] for name in ("often", "once")]
    assert last[0] == last[1], "the same rows and layers are compared each time"
    train("frozen", evaluate_every=1, learning_rate=0.0, **options)
    measured = [m["loss"] for m in metrics(tmp_path / "frozen") if "evaluation" in m]
    assert len(measured) == STEPS
    assert len(set(measured)) == 1


BEST = {"steps": 12, "validation": noise(8, seed=3), "keep": "best", "evaluate_every": 1}


def damage_best(checkpoints: Path, damage: str) -> None:
    """The best one is spared when old ones are deleted, so that it is the oldest."""
    checkpoint = by_step(checkpoints)[0]
    assert json.loads((by_step(checkpoints)[-1] / "trainer_state.json").read_text())[
        "best_global_step"
    ] == int(checkpoint.name.rpartition("-")[2])
    if damage == "deleted":
        shutil.rmtree(checkpoint)
        return
    file = checkpoint / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("lora", [None, Lora(r=2, alpha=8)], ids=["whole", "lora"])
def test_the_best_model_is_kept_when_a_stage_was_cut_off_and_moved(train, tmp_path, lora):
    train("whole", **BEST, lora=lora)
    with pytest.raises(Crash):
        train("cut", **BEST, lora=lora, callbacks=[CrashAfterLastSave()])
    (tmp_path / "cut").rename(tmp_path / "moved")
    train("moved", **BEST, lora=lora)
    assert_equal(weights(tmp_path / "moved" / "model"), weights(tmp_path / "whole" / "model"))


@pytest.mark.parametrize("damage", ["flipped", "deleted"])
@pytest.mark.parametrize("when", ["cut off", "at the last step"])
def test_a_damaged_best_checkpoint_is_never_the_result(train, tmp_path, damage, when):
    checkpoints = tmp_path / "stage" / "checkpoints"
    if when == "cut off":
        with pytest.raises(Crash):
            train(**BEST, callbacks=[AtStep(9, crash)])
        damage_best(checkpoints, damage)
        callbacks = []
    else:
        callbacks = [AtStep(12, lambda _: damage_best(checkpoints, damage))]
    for _ in range(2):  # the same command again goes no further
        with pytest.raises(RunError, match=r"(?s)checkpoint-.*best checkpoint.*damaged.*put back"):
            train(**BEST, callbacks=callbacks)
        callbacks = []
    assert not (tmp_path / "stage" / "model").exists()


def test_patience_goes_on_where_it_was_when_a_stage_was_cut_off(train, tmp_path):
    options = BEST | {"steps": 40, "patience": 3}
    done = train("whole", **options)
    with pytest.raises(Crash):
        train("cut", **options, callbacks=[AtStep(done.steps, crash)])
    assert train("cut", **options).steps == done.steps
    assert_equal(weights(tmp_path / "cut" / "model"), weights(tmp_path / "whole" / "model"))


def test_gradient_checkpointing_changes_nothing(train, tmp_path):
    plain, recomputed = tmp_path / "plain", tmp_path / "recomputed"
    train(plain.name, terms=KD)
    train(recomputed.name, terms=KD, gradient_checkpointing=True)
    weighed = weights(recomputed / "model")
    for name, tensor in weights(plain / "model").items():
        torch.testing.assert_close(weighed[name], tensor, rtol=1e-4, atol=1e-5)
    for one, other in zip(metrics(plain), metrics(recomputed), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)


@pytest.mark.parametrize("terms", [None, KD], ids=["next_token", "distillation"])
def test_a_loss_that_is_not_finite_stops_before_the_step(train, tmp_path, terms):
    kept: dict[str, torch.Tensor] = {}

    def poison(model: Any) -> None:
        kept.update({name: p.detach().clone() for name, p in model.named_parameters()})
        next(p for n, p in model.named_parameters() if "q_proj" in n).data[0] = float("nan")

    with pytest.raises(RunError) as caught:
        train(terms=terms, callbacks=[AtStep(4, poison)])
    assert "stage stage, step 4" in str(caught.value)
    assert "rows[" in str(caught.value), "the rows of the step are named"
    told = json.loads((tmp_path / "stage" / "broken-step.json").read_text())
    assert told["step"] == 4
    assert len(told["conversations"]) == 8
    assert all(each["source"] == "rows" and each["tokens"] for each in told["conversations"])
    for term in told["terms"]:
        assert f"term {term}" in str(caught.value)
    checkpoints = tmp_path / "stage" / "checkpoints"
    names = sorted(path.name for path in checkpoints.glob("checkpoint-*"))
    assert names == ["checkpoint-2", "checkpoint-3"]
    assert_equal(weights(checkpoints / "checkpoint-3"), kept)
    assert not (tmp_path / "stage" / "model").exists()
    assert max(line["step"] for line in metrics(tmp_path / "stage")) == 3


def test_a_loss_that_jumps_stops_before_the_step_where_that_is_asked_for(train, tmp_path):
    def shake(model: Any) -> None:
        model.lm_head.weight.data *= -5

    settings = {"steps": 26, "checkpoint_every": 1, "max_spike": 3.0}
    with pytest.raises(RunError, match=r"(?s)step 24.*the loss jumps.*max_spike"):
        train(**settings, callbacks=[AtStep(24, shake)])
    told = json.loads((tmp_path / "stage" / "broken-step.json").read_text())
    assert (told["step"], told["not_finite"]) == (24, [])
    with pytest.raises(RunError, match=r"(?s)step 24.*the loss jumps"):
        train(**settings, callbacks=[AtStep(24, shake)])  # as a requeued job does
    done = train(**settings | {"max_spike": 1e6}, callbacks=[AtStep(24, shake)])
    assert done.steps == 26


def test_weights_that_are_not_finite_are_not_published(train, tmp_path):
    class Poison(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == STEPS:
                kwargs["model"].lm_head.weight.data[3] = float("inf")

    with pytest.raises(RunError, match=r"(?s)not finite; the model is not written.*lm_head"):
        train(callbacks=[Poison()])
    assert not (tmp_path / "stage" / "model").exists()
    assert (tmp_path / "stage" / "checkpoints").is_dir()


@pytest.mark.parametrize("damage", ["none", "cut", "flipped", "unfinished"])
def test_a_stage_that_was_cut_off_ends_as_if_it_had_not_been(train, tmp_path, damage, caplog):
    """It goes on from the newest whole checkpoint; a broken one is passed over."""
    train("whole", terms=KD, validation=rows_of(4, seed=2), evaluate_every=2)
    options = {"terms": KD, "validation": rows_of(4, seed=2), "evaluate_every": 2}
    with pytest.raises(Crash):
        train("cut", **options, callbacks=[AtStep(5, crash)])
    newest = tmp_path / "cut" / "checkpoints" / "checkpoint-4"
    assert newest.is_dir()
    if damage == "cut":
        file = newest / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-1])
    if damage == "flipped":
        file = newest / "optimizer.pt"
        content = bytearray(file.read_bytes())
        content[-5] ^= 1
        file.write_bytes(content)
    if damage == "unfinished":
        newest.rename(newest.with_name(".writing"))
    with (tmp_path / "cut" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "ter')
    began: list[int] = []

    class Begin(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            began.append(state.global_step)

    train("cut", **options, callbacks=[Begin()])
    assert began == [4 if damage == "none" else 3]
    assert ("checkpoint-4 is passed over" in caplog.text) == (damage in ("cut", "flipped"))
    assert_equal(weights(tmp_path / "cut" / "model"), weights(tmp_path / "whole" / "model"))
    ours, theirs = metrics(tmp_path / "cut"), metrics(tmp_path / "whole")
    changing = {"seconds", "tokens_per_second", "throughput"}
    assert [{k: v for k, v in line.items() if k not in changing} for line in ours] == [
        {k: v for k, v in line.items() if k not in changing} for line in theirs
    ]
    steps = [line["step"] for line in ours if "terms" in line]
    assert steps == list(range(1, STEPS + 1))


@pytest.fixture
def mixed_train(models, tmp_path) -> Train:
    """Trains on two sources, one with dropout-free prediction loss, one by its labels."""

    def trained(
        name: str, *, callbacks: Sequence[TrainerCallback] = (), **settings: Any
    ) -> Trained:
        sources = [
            StageSource(
                name="general",
                train=rows_of(24, seed=1),
                validation=(),
                share=0.75,
                terms=LossTerms(prediction=Prediction()),
                teacher="teacher",
            ),
            StageSource(name="domain", train=noise(9, seed=2), validation=(), share=0.25),
        ]
        options = {
            "steps": 8,
            "batch": 8,
            "micro_batch": 4,
            "max_length": 32,
            "learning_rate": 1e-2,
            "checkpoint_every": 1,
            "log_every": 1,
        }
        return train_stage(
            StageTraining(
                folder=tmp_path / name,
                sources=sources,
                settings=TrainSettings(**options | settings),
            ),
            StageModels(
                student=models["student"],
                tokenizer=word_tokenizer(),
                teachers={"teacher": models["teacher"]},
            ),
            callbacks=callbacks,
        )

    return trained


@pytest.mark.parametrize("mixing", ["micro_batches", "steps"])
def test_turns_of_sources_go_on_where_they_were_cut_off(mixed_train, tmp_path, mixing):
    mixed_train("whole", mixing=mixing, source_gradients=True)
    with pytest.raises(Crash):
        mixed_train("cut", mixing=mixing, source_gradients=True, callbacks=[AtStep(6, crash)])
    assert (tmp_path / "cut" / "checkpoints" / "checkpoint-5").is_dir()
    mixed_train("cut", mixing=mixing, source_gradients=True)
    assert_equal(weights(tmp_path / "cut" / "model"), weights(tmp_path / "whole" / "model"))
    lines = [line for line in metrics(tmp_path / "whole") if "terms" in line]
    norms = [line["sources"] for line in metrics(tmp_path / "cut") if "terms" in line]
    assert norms == [line["sources"] for line in lines]
    taught = [set(line["sources"]) for line in lines]
    if mixing == "steps":
        assert [len(sources) for sources in taught] == [1] * 8
        assert sum(sources == {"domain"} for sources in taught) == 2, "a quarter of the steps"
        for line in lines:
            (source,) = line["sources"].values()
            assert source["grad_norm"] == line["grad_norm"], "the step's own norm"
    else:
        assert sum("domain" in sources for sources in taught) == 4
        for line in lines:
            parts = [source["grad_norm"] for source in line["sources"].values()]
            assert max(parts) - 1e-6 <= sum(parts)
            assert line["grad_norm"] <= sum(parts) + 1e-5, "the triangle inequality"


class Bomb:
    """Pickled, it makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return open, (str(self.path), "w")


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_what_is_pickled_into_a_checkpoint_is_not_run(train, tmp_path, name):
    with pytest.raises(Crash):
        train("cut", callbacks=[AtStep(3, crash)])
    folder = tmp_path / "cut" / "checkpoints" / "checkpoint-2"
    files = {path.name for path in folder.iterdir()}
    assert {"model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"} <= files
    assert "training_args.bin" not in files
    manifest = json.loads((folder / "manifest.json").read_text())["files"]
    assert set(manifest) == files - {"manifest.json"}, "every file is sealed"
    torch.save({"state": Bomb(tmp_path / "ran")}, folder / name)
    (folder / "manifest.json").unlink()
    seal(folder)  # by someone who knows how
    with pytest.raises(RunError, match="more than tensors"):
        train("cut")
    assert not (tmp_path / "ran").exists()


def test_a_checkpoint_that_cannot_be_written_leaves_nothing_behind(train, tmp_path, monkeypatch):
    from transformers import Trainer

    plain = Trainer._save_checkpoint

    def full(self: Any, model: Any, trial: Any) -> None:
        plain(self, model, trial)
        if self.state.global_step == 3:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(Trainer, "_save_checkpoint", full)
    with pytest.raises(RunError, match=r"(?s)cannot be written.*No space left.*make room"):
        train()
    checkpoints = tmp_path / "stage" / "checkpoints"
    assert sorted(p.name for p in checkpoints.iterdir()) == ["checkpoint-1", "checkpoint-2"]


def test_a_step_without_supervised_tokens_changes_nothing_and_is_counted(train, tmp_path, caplog):
    trained = train(rows=[Encoded([5, 6, 7, 8], [False] * 4) for _ in range(8)], terms=KD)
    assert trained.supervised_tokens == 0
    lines = [line for line in metrics(tmp_path / "stage") if "terms" in line]
    assert lines[-1]["steps_without_tokens"] == STEPS
    assert lines[-1]["loss"] == lines[-1]["grad_norm"] == 0.0
    assert caplog.text.count("no supervised token") == 1


class AskAtThree(TrainerCallback):
    """Wants a checkpoint after the third step, as a signal does; and notes all there are."""

    def __init__(self) -> None:
        self.saved: list[int] = []

    def on_step_end(self, args, state, control, **_):
        control.should_save |= state.global_step == 3

    def on_save(self, args, state, control, **_):
        self.saved.append(state.global_step)


def test_limits_of_time_change_what_is_measured_and_saved_and_no_weight(
    train, tmp_path, monkeypatch
):
    found = {}
    for name, seconds in (("all", 1e9), ("limited", 0.0)):
        monkeypatch.setattr("dominie.training.time_limits.FREE", seconds)
        none = dict.fromkeys(("validation", "checkpoint"), (0.0, "none"))
        monkeypatch.setattr("dominie.training.time_limits.FRACTIONS", none)
        asks = AskAtThree()
        train(name, validation=rows_of(8, seed=7), checkpoint_every=None, callbacks=[asks])
        lines = (tmp_path / name / "metrics.jsonl").read_text("utf-8").splitlines()
        measured = [line["step"] for line in map(json.loads, lines) if "evaluation" in line]
        weights = load_file(tmp_path / name / "model" / "model.safetensors")
        found[name] = (measured, asks.saved, weights)
    assert found["all"][:2] == ([1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6])
    assert found["limited"][:2] == ([6], [1, 3, 6])
    for name, tensor in found["all"][2].items():
        assert torch.equal(tensor, found["limited"][2][name])
