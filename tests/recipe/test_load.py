"""Recipes: shorthands, overrides, strictness, and the names they use."""

from __future__ import annotations

from pathlib import Path

import pytest

from dominie.core.errors import InputError
from dominie.recipe import dump_recipe, load_recipe

RECIPE = """
name: shop
models:
  mixtral: {path: mistralai/Mixtral-8x7B-Instruct-v0.1, quantize: 8bit}
data:
  general: {path: general.jsonl, validation_fraction: 0.01, test_fraction: 0.05}
  ecommerce: {path: ecommerce.jsonl, validation_fraction: 0.05, test_fraction: 0.1}
train: {learning_rate: 2e-5, epochs: 2, batch: 256, max_length: 2048, precision: bf16, seed: 0}
stages:
  distill:
    student: mistralai/Mistral-7B-v0.1
    teacher: mixtral
    data: {general: 1.0}
    loss: {prediction: 1.0, attention: 1.0}
  expert:
    student: distill
    data: {ecommerce: 1.0}
    loss: {next_token: 1.0}
    train: {epochs: 1, weight_decay: 0.1}
  align:
    student: distill
    data:
      ecommerce: {share: 0.1, teacher: expert}
      general: {share: 0.9, teacher: distill}
    loss: {prediction: {weight: 1.0, temperature: 2.0}}
evaluate:
  models: {base: mistralai/Mistral-7B-v0.1, align: align}
  tasks:
    domain: {source: ecommerce, metric: exact_match, split: test}
"""


@pytest.fixture
def write(tmp_path: Path):
    def written(text: str = RECIPE, old: str = "", new: str = "") -> Path:
        assert old in text
        path = tmp_path / "recipe.yaml"
        path.write_text(text.replace(old, new, 1))
        return path

    return written


def test_the_design_s_example_means_what_it_says(write):
    recipe = load_recipe(write())
    distill, expert, align = (recipe.stages[n] for n in ("distill", "expert", "align"))
    assert recipe.train.learning_rate == distill.train.learning_rate == 2e-5
    assert distill.loss_on("general").attention.weight == 1.0
    assert (expert.train.epochs, expert.train.batch) == (1, 256)
    assert expert.train.arguments == {"weight_decay": 0.1}
    assert align.teacher_on("ecommerce") == "expert"
    assert align.teacher_on("general") == "distill"
    assert align.loss_on("general").prediction.temperature == 2.0
    assert expert.teacher_on("ecommerce") is None
    assert align.models == ["distill", "expert"]
    assert recipe.model("mixtral").placed == recipe.model("mixtral").bits == "8bit"


@pytest.mark.parametrize(
    ("said", "held", "bits"),
    [
        ("null", "device", None),
        ("8bit", "8bit", "8bit"),
        ("cpu", None, None),
        ("device", None, None),
    ],
)
def test_quantize_is_another_way_to_say_a_placement(write, said, held, bits):
    overrides = [f"models.mixtral.placement={said}"]
    if held is None:  # the recipe says quantize: 8bit
        with pytest.raises(InputError, match=f"placement is {said} and quantize 8bit"):
            load_recipe(write(), overrides)
        overrides.append("models.mixtral.quantize=null")
    elif said == "null":
        overrides.append("models.mixtral.quantize=null")
    mixtral = load_recipe(write(), overrides).model("mixtral")
    assert (mixtral.placed, mixtral.bits) == (held or said, bits)


CACHED = ["models.mixtral.quantize=null", "models.mixtral.placement=cached"]
NO_MAPS = "stages.distill.loss={prediction: 1.0}"


@pytest.mark.parametrize(
    ("overrides", "cached"),
    [
        ([*CACHED, NO_MAPS], True),
        (CACHED, False),  # attention is compared, which no cache holds
        ([*CACHED, "stages.distill.loss={prediction: {weight: 1.0, kind: reverse_kl}}"], False),
        ([*CACHED, NO_MAPS, "stages.distill.cache=false"], False),
        ([*CACHED, NO_MAPS, "stages.distill.data.general={share: 1.0, cache: false}"], False),
        ([NO_MAPS], False),
    ],
)
def test_a_cached_model_is_a_cache_on_every_source_that_can_learn_from_one(
    write, tmp_path, overrides, cached
):
    recipe = load_recipe(write(), overrides)
    assert (recipe.stages["distill"].cache_on("general") is not None) is cached
    again = tmp_path / "again.yaml"
    again.write_text(dump_recipe(recipe))
    assert load_recipe(again) == recipe


@pytest.mark.parametrize(
    ("cache", "most"),
    [
        ("true", 3.16),
        ("{threshold: 0.0006}", 10),
        ("{threshold: 0.00001}", 10),
        ("{threshold: 0.3}", 1),
        ("{scheme: sampled}", 1.73),
        ("{scheme: sampled, samples: 400}", 4.9),
        ("{scheme: sampled, samples: 2}", 1),
        ("{scheme: top}", 1.5),
    ],
)
def test_a_temperature_that_a_cache_cannot_serve_is_refused(write, cache, most):
    overrides = ["models.mixtral.quantize=null", f"stages.distill.cache={cache}"]
    at = "stages.distill.loss={{prediction: {{weight: 1.0, temperature: {}}}}}"
    load_recipe(write(), [*overrides, at.format(most * 0.99)])
    too_high = [*overrides, at.format(most * 1.01)]
    with pytest.raises(InputError, match=rf"(?s)temperature is too high.*at most {most:g}"):
        load_recipe(write(), too_high)
    load_recipe(write(), [*too_high[:-2], too_high[-1]])


@pytest.mark.parametrize("placement", ["cpu", "sharded", "cached"])
def test_a_student_is_not_placed_like_a_frozen_model(write, placement):
    overrides = ["models.mixtral.quantize=null", f"models.mixtral.placement={placement}"]
    with pytest.raises(InputError, match=r"stages\.expert\.student: mixtral"):
        load_recipe(write(), [*overrides, "stages.expert.student=mixtral"])


def test_the_resolved_recipe_reads_back_equal(write, tmp_path):
    recipe = load_recipe(write())
    again = tmp_path / "again.yaml"
    again.write_text(dump_recipe(recipe))
    assert load_recipe(again) == recipe


@pytest.mark.parametrize(
    ("override", "read"),
    [
        ("stages.align.train.epochs=1", lambda r: r.stages["align"].train.epochs == 1),
        ("train.learning_rate=1e-3", lambda r: r.stages["expert"].train.learning_rate == 1e-3),
        (
            "stages.align.data.general.share=0.5",
            lambda r: r.stages["align"].data["general"].share == 0.5,
        ),
        ("stages.distill.data.general=2", lambda r: r.stages["distill"].data["general"].share == 2),
        (
            "stages.distill.loss.attention.layers=last",
            lambda r: r.stages["distill"].loss.attention.layers == "last",
        ),
        ("stages.distill.loss.attention=null", lambda r: not r.stages["distill"].loss.attention),
        (
            "stages.distill.train.lora.r=8",
            lambda r: r.stages["distill"].train.lora.r == 8,
        ),
        ("name=other", lambda r: r.name == "other"),
    ],
)
def test_any_value_can_be_overridden(write, override, read):
    assert read(load_recipe(write(), [override]))


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("teacher: mixtral", "techer: mixtral", ["stages.distill.techer", "did you mean teacher?"]),
        ("weight: 1.0, temp", "weigth: 1.0, temp", ["weigth", "did you mean weight?"]),
        ("epochs: 2", "epoch: 2", ["train.epoch", "did you mean epochs?"]),
        ("weight_decay", "weight_decai", ["weight_decai", "did you mean weight_decay?"]),
        ("validation_fraction: 0.01", "validation: 0.01", ["data.general.validation"]),
        ("quantize", "quantise", ["models.mixtral.quantise", "did you mean quantize?"]),
        ("metric: exact_match", "metrik: exact_match", ["metrik", "did you mean metric?"]),
        ("batch: 256", "per_device_train_batch_size: 4", ["dominie sets this", "micro_batch"]),
        ("learning_rate: 2e-5", "learning_rate: fast", ["train.learning_rate", "'fast'"]),
        ("epochs: 2", "epochs: -1", ["epochs must be positive"]),
        ("temperature: 2.0", "temperature: 0", ["temperature must be positive"]),
        ("share: 0.1", "share: -0.1", ["share must be finite and not negative"]),
        ("{general: 1.0}", "{general: 0}", ["the mix holds nothing"]),
        ("{general: 1.0}", "{genral: 1.0}", ["unknown source 'genral'", "did you mean general?"]),
        ("student: distill", "student: distil", ["'distil'", "did you mean distill?"]),
        ("teacher: expert", "teacher: exprt", ["'exprt'", "did you mean expert?"]),
        ("    teacher: mixtral\n", "", ["there is no", "stages.distill.teacher"]),
        ("student: mistralai/Mistral-7B-v0.1", "student: align", ["need each other", "align"]),
        ("  expert:\n", "  distill:\n", ["stands twice"]),
        ("source: ecommerce", "source: shop", ["unknown source 'shop'"]),
        ("test_fraction: 0.1", "test_fraction: 0.0", ["no test split", "test_fraction"]),
        ("name: shop", "name: ../shop", ["not usable as a name"]),
        ("  expert:", "  evaluation:", ["not usable as a name"]),
        ("stages:", "stages: [", ["not valid YAML"]),
    ],
)
def test_a_faulty_recipe_is_one_clear_message(write, old, new, said):
    with pytest.raises(InputError) as caught:
        load_recipe(write(RECIPE, old, new))
    for words in said:
        assert words in str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("stages:\n<: {student: m}", "<: unknown key"),
        ('stages: {"<train>": {student: m, foo: 1}}', "stages.<train>.foo: unknown key"),
        ('stages: {"<a>": {student: m, data: {d: 1}, batch: 2}}', "mean stages.<a>.train.batch?"),
        ("train: {: 0.9}", "train.None: unknown key"),
        ("evaluate: {models: {a: a}, benchmarks: {b: 3}}", "evaluate.benchmarks.b: the value"),
        ("evaluate: {models: {a: a}, benchmarks: {b: {kind: x}}}", "b.kind: unknown kind 'x'"),
    ],
)
def test_keys_that_look_like_something_else_are_named(write, text, said):
    stages = "" if "stages" in text else "\nstages: {s: {student: m, data: {d: 1}}}"
    with pytest.raises(InputError) as refused:
        load_recipe(write("data: {d: {path: d.jsonl}}\n" + text + stages))
    assert said in str(refused.value)


@pytest.mark.parametrize("text", ["", "- a\n- b", "just words"])
def test_something_else_is_not_a_recipe(write, text):
    with pytest.raises(InputError):
        load_recipe(write(text))


def test_a_missing_recipe_is_named(tmp_path):
    with pytest.raises(InputError, match=r"nowhere\.yaml"):
        load_recipe(tmp_path / "nowhere.yaml")


@pytest.mark.parametrize("override", ["epochs", "=1", "a..b=1", "name.x.y=1"])
def test_a_faulty_override_is_refused(write, override):
    with pytest.raises(InputError):
        load_recipe(write(), [override])


@pytest.mark.parametrize(
    ("override", "meant"),
    [
        ("stages.algin.train.epochs=1", "did you mean stages.align?"),
        ("data.genral.test_fraction=0.1", "did you mean data.general?"),
        ("models.mixtrl.quantize=4bit", "did you mean models.mixtral?"),
    ],
)
def test_an_override_of_a_misspelt_name_makes_no_new_thing(write, override, meant):
    with pytest.raises(InputError, match="names what the recipe has not") as refused:
        load_recipe(write(), [override])
    assert refused.value.do == meant


def test_an_override_can_make_a_new_thing(write):
    more = ["data.third.path=toyworld:domain", "models.large.path=org/model"]
    recipe = load_recipe(write(), more)
    assert (recipe.data["third"].path, recipe.models["large"].path) == (
        "toyworld:domain",
        "org/model",
    )


@pytest.mark.parametrize(("file", "name"), [("shop.yaml", "shop"), ("shop/recipe.yaml", "shop")])
def test_a_recipe_without_a_name_is_called_as_its_file_or_folder(tmp_path, file, name):
    (tmp_path / "shop").mkdir()
    (tmp_path / file).write_text(RECIPE.replace("name: shop", ""))
    assert load_recipe(tmp_path / file).name == name


def test_paths_start_at_the_recipe_s_folder(write, tmp_path):
    (tmp_path / "general.jsonl").write_text("")
    recipe = load_recipe(write())
    assert recipe.data["general"].path == str(tmp_path / "general.jsonl")
    assert recipe.data["ecommerce"].path == str(tmp_path / "ecommerce.jsonl"), (
        "missed where it belongs"
    )


@pytest.mark.parametrize(
    "path",
    sorted(
        path
        for path in (Path(__file__).parents[2] / "recipes").rglob("*.yaml")
        if path.parent.name != "accelerate"  # configurations of accelerate's own
    ),
    ids=lambda p: p.name,
)
def test_every_shipped_recipe_is_valid(path: Path):
    recipe = load_recipe(path)
    assert dump_recipe(recipe)


MERGED = """  soup:
    merge: {models: {distill: 0.7, expert: 0.3}}
"""


def test_a_stage_may_merge_instead_of_train(write):
    recipe = load_recipe(write(old="evaluate:", new=f"{MERGED}evaluate:"))
    soup = recipe.stages["soup"]
    assert (soup.kind, soup.models) == ("merge", ["distill", "expert"])
    assert list(recipe.trained) == ["distill", "expert", "align"]
    again = write(text=dump_recipe(recipe))
    assert load_recipe(again) == recipe


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{merge: {model: {distill: 1}}}", "stages.soup.merge.model"),
        ("{merge: {models: {distil: 1}}}", "did you mean distill"),
        ("{merge: {models: {distill: much}}}", "stages.soup.merge.models.distill"),
        ("{merge: {models: {soup: 1}}}", "need each other"),
        ("{merge: {models: {distill: 1}}, student: distill}", "stages.soup.student"),
        ("{merge: {models: {distill: 1}}, train: {epochs: 1}}", "stages.soup.train"),
        ("{merge: {models: {distill: 1}, method: linaer}}", "stages.soup.merge.method"),
    ],
)
def test_a_merge_that_is_wrong_is_named(write, line, said):
    with pytest.raises(InputError) as refused:
        load_recipe(write(old="evaluate:", new=f"  soup: {line}\nevaluate:"))
    assert said in str(refused.value)
    assert "<" not in str(refused.value)


def test_an_override_changes_one_place_where_an_alias_shares_several(tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        "data: {d: {path: d}}\n"
        "stages:\n"
        "  a: {student: o/m, data: {d: 1.0}, loss: {next_token: 1.0}, train: &t {steps: 7}}\n"
        "  b: {student: o/m, data: {d: 1.0}, loss: {next_token: 1.0}, train: *t}\n"
    )
    found = load_recipe(recipe, ["stages.b.train.steps=3"])
    assert {name: stage.train.steps for name, stage in found.trained.items()} == {"a": 7, "b": 3}


def test_a_folder_stands_for_its_recipe_and_a_near_name_is_proposed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shop").mkdir()
    (tmp_path / "shop" / "recipe.yaml").write_text(
        "name: shop\ndata: {d: d.jsonl}\n"
        "stages: {s: {student: a/b, data: {d: 1.0}, loss: {next_token: 1.0}}}\n"
    )
    assert load_recipe("shop").name == "shop"
    for wrong in ("shop.yaml", "shop/recipe.yml", "shops/recipe.yaml"):
        with pytest.raises(InputError, match=r"did you mean shop/recipe.yaml\?"):
            load_recipe(wrong)
    with pytest.raises(InputError, match="dominie init DIR"):
        load_recipe("else.yaml")


@pytest.mark.parametrize("above", ["", "stages.s."])
def test_a_key_that_belongs_into_train_is_told_so(tmp_path, above):
    (tmp_path / "r.yaml").write_text(
        "data: {d: d.jsonl}\nstages: {s: {student: a/b, data: {d: 1.0}, loss: {next_token: 1.0}}}\n"
    )
    with pytest.raises(InputError, match=f"did you mean {above}train.steps"):
        load_recipe(tmp_path / "r.yaml", [f"{above}steps=5"])


@pytest.mark.parametrize("bound", ["0.1", "{general: 0.1, ecommerce: 1.5}"])
def test_a_stage_stops_at_a_bound_of_all_or_of_named_sources(write, bound):
    override = f"stages.align.train.stop_at={{forgetting: {bound}}}"
    recipe = load_recipe(write(), [override])
    train = recipe.stages["align"].train
    assert train.stop_at.forgetting in (0.1, {"general": 0.1, "ecommerce": 1.5})
    assert train.measures_forgetting
    assert train.validation_decides
    assert not train.loss_decides
    assert not recipe.stages["distill"].train.measures_forgetting
    again = write(dump_recipe(recipe))
    assert load_recipe(again).stages["align"].train.stop_at == train.stop_at


@pytest.mark.parametrize(
    ("stop_at", "said"),
    [
        ("{forgetting: {generl: 0.1}}", ["stop_at.forgetting", "'generl'", "did you mean general"]),
        ("{forgetting: 0}", ["forgetting must be positive and finite, got 0"]),
        ("{forgetting: {general: -1}}", ["forgetting of general must be positive"]),
        ("{forgeting: 0.1}", ["did you mean forgetting?"]),
    ],
)
def test_bounds_that_mean_nothing_are_refused(write, stop_at, said):
    with pytest.raises(InputError) as refused:
        load_recipe(write(), [f"stages.align.train.stop_at={stop_at}"])
    assert all(text in str(refused.value) for text in said), str(refused.value)
