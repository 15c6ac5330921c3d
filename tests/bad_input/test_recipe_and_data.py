"""Recipes and data that cannot be used are refused before anything is loaded."""

from __future__ import annotations

import pytest

TURN = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}'


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"\xff\xfe\x00", ["cannot be read", "UTF-8"]),
        ("", ["not a recipe"]),
        ("- a", ["not a recipe", "a list"]),
        ("name: x\ndata: {}", ["nothing to do", "at least one stage"]),
        ("name: x\n\tdata: y", ["r.yaml:2", "not valid YAML"]),
        ("a: &a {b: *a}", ["contains itself"]),
        ("name: !!python/object/apply:os.getcwd []", ["not valid YAML"]),
        ("name: x\nname: y", ["stands twice", "r.yaml:2"]),
    ],
)
def test_a_recipe_that_cannot_be_read(refused, work, dominie, text, words):
    (work / "r.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    refused(dominie("run", "r.yaml"), *words)


def test_a_recipe_that_is_missing_or_a_folder(refused, work, dominie):
    refused(dominie("run", "no.yaml"), "no.yaml", "no such recipe")
    refused(dominie("run", "m"), "m: the recipe cannot be read", "directory")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.steps", ["not an override", "a.b.c=value"]),
        ("train.steps=[1", ["not valid YAML"]),
        ("train.stpes=1", ["unknown key", "did you mean steps?"]),
        ("train.steps.x=1", ["not a mapping"]),
        ("data=3", ["data", "not a mapping"]),
        ("data.d=null", ["data.d.path", "missing key"]),
        ("data.d.path=''", ["the path is empty"]),
        ("data.d.subset=x", ["a local file has no subset"]),
        ("data.d.validation_fraction=0.9", ["more than the whole"]),
        ("data.d.test_fraction=1.0", ["held out whole", "data.d.test_fraction"]),
        ("stages.s=null", ["stages.s.student", "missing key"]),
        ("stages.s.student=''", ["the path is empty"]),
        ("stages.s.data.d=-1", ["share must be finite and not negative"]),
        ("stages.s.data.d=0", ["the mix holds nothing"]),
        ("stages.s.data.d=[1]", ["stages.s.data.d.share", "a number", "a list"]),
        ("stages.s.loss={prediction: 1.0}", ["no", "teacher", "stages.s.teacher"]),
        ("stages.s.loss.attention={layers: 3}", ["attention.layers", "a list", "found     3"]),
        ("train.micro_batch=3", ["micro_batch 3 must divide batch 4"]),
        ("train.seed=-1", ["seed must be from 0"]),
        ("train.learning_rate=fast", ["learning_rate", "a number", "'fast'"]),
        ("train.learning_rate=.nan", ["learning_rate"]),
        (
            "train.mixing=rows",
            ["train.mixing", "'conversations', 'micro_batches' or 'steps'", "rows"],
        ),
        ("train={precision: fp16, source_gradients: true}", ["source_gradients", "fp16"]),
        (
            "stages={s: {student: m, data: {d: 1.0}, loss: {next_token: 1.0}, "
            "train: {lora: {r: 4, merge: false}}}, t: {student: s, data: {d: 1.0}, "
            "loss: {next_token: 1.0}, train: {lora: {r: 8, merge: false}}}}",
            [
                "stages.t.train.lora.r",
                "cannot change its shape",
                "4, as in stages.s",
                "found     8",
            ],
        ),
        ("train.precision=fp8", ["'fp32', 'bf16' or 'fp16'", "fp8"]),
        ("train.weight_decay=heavy", ["train.weight_decay", "a number", "'heavy'"]),
        ("train.weight_decay=.inf", ["train.weight_decay", "a finite number"]),
        ("train.dataloader_num_workers=1.5", ["dataloader_num_workers", "a whole number"]),
        ("train.save_only_model=true", ["dominie sets this itself"]),
        ("train.optim=sgdx", ["transformers refuses the settings", "sgdx"]),
        ("train.evaluate_rows=-1", ["evaluate_rows must be from 0"]),
        ("train.lora={alpha: -1}", ["alpha must be positive"]),
        ("train.lora={target_modules: 3}", ["lora.target_modules", "text or a list"]),
        ("train.keep=best", ["nothing to choose the best model by", "validation_fraction"]),
        ("train.max_length=3", ["nothing is left to train on", "raise max_length"]),
        ("train.max_length=5000", ["context", "at most 256", "train.max_length=256"]),
        ("evaluate.batch=0", ["batch must be at least 1"]),
        ("evaluate.tasks.t.by=famly", ["no row has the field 'famly'", "family"]),
        ("evaluate.tasks.t.split=validation", ["no validation split"]),
        ("name=a b", ["not usable as a name"]),
    ],
)
def test_a_value_that_cannot_be_used(refused, work, dominie, override, words):
    refused(dominie("check", "r.yaml", override), *words)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["the file is empty"]),
        (f"{TURN}\n" + '{"messages": [\n', ["d.jsonl:2", "malformed JSON"]),
        ('{"messages": [{"role": "user", "content": "a"}]}', ["d.jsonl:1", "no assistant turn"]),
        ('{"prompt": "a"}\n', ["d.jsonl:1", "a prompt and no answer"]),
        (TURN.replace("user", "bot"), ["d.jsonl:1", "unknown role", "'bot'"]),
        (TURN.replace('"user"', '"tool"'), ["d.jsonl:1", "the chat template fails"]),
        ('{"foo": 1}\n', ["d.jsonl:1", "no known format", "foo"]),
    ],
)
def test_data_that_cannot_be_learnt_from(refused, work, dominie, text, words):
    (work / "d.jsonl").write_text(text)
    refused(dominie("check", "r.yaml"), *words)


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("gone.jsonl", ["gone.jsonl", "no such file"]),
        ("r.yaml", ["does not tell a format"]),
        ("m/tokenizer.json", ["tokenizer.json:1", "no known format"]),
        ("runs", ["holds no data file"]),
        ("broken.parquet", ["not a Parquet file"]),
        ("toyworld:genral", ["did you mean toyworld:general?"]),
        ("toyworld:general?rows=-1", ["rows is not a whole number"]),
    ],
)
def test_a_path_that_is_not_data(refused, work, dominie, path, words):
    (work / "runs").mkdir()
    (work / "broken.parquet").write_text("PAR1")
    refused(dominie("check", "r.yaml", f"data.d.path={path}", "--runs", "elsewhere"), *words)


def test_models_and_runs_that_are_not_there(refused, work, dominie):
    refused(dominie("run", "r.yaml", "--only", "t"), "--only", "no such model", "expected  s")
    refused(dominie("compare", "runs/none"), "runs/none", "no such run folder")
    refused(dominie("compare", "m"), "m", "this folder is not a run")
    refused(dominie("sweep", "r.yaml", "--seeds", "4-1"), "--seeds 4-1", "0-4")
    refused(dominie("sweep", "r.yaml", "--over", "train.stpes=1,2"), "did you mean steps?")
    refused(dominie("sweep", "r.yaml", "--best-by", "t"), "not chosen on the test split")
    assert not (work / "runs").exists()
