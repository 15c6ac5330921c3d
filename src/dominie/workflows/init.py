"""`dominie init`: writes a commented recipe and example data into a folder."""

from __future__ import annotations

import itertools
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dominie.core.errors import InputError
from dominie.toyworld import materialise

HEAD = """\
# {purpose}
#
#     dominie check recipe.yaml     reads every model, template and row; trains nothing
#     dominie run recipe.yaml       trains, scores, and writes runs/{name}/report.html
#
# {runs}, on tiny models and the example data beside it. Then put your own models and
# data at the arrows (<-); everything else can stay as it is, or be set when you know why.
name: {name}
"""

MODELS = """
models:                       # a folder, or organisation/model on the hub
  small: {path: "toyworld:student"}     # <- who learns: mistralai/Mistral-7B-v0.1, say
"""

TEACHER_MODEL = """\
  large: {path: "toyworld:teacher"}     # <- who teaches; it has to have the student's tokens
"""

SERVED_MODEL = """\
  large:                      # <- who teaches, behind vLLM or SGLang: docs/served.md; start it
    endpoint: http://127.0.0.1:8000/v1
    model: large              # <- the name that the server gives it
    tokenizer: "toyworld:student"       # <- of that model; it has to have the student's tokens
    # key_env: TEACHER_KEY    # if the server asks for a key: the variable that holds it
"""

DATA = """
data:                         # JSONL, JSON, Parquet or a datasets id; see docs/data.md for layouts
"""

SOURCES = {
    "general": """\
  general: {path: general.jsonl, validation_fraction: 0.1, test_fraction: 0.1}   # <- instructions
""",
    "domain": """\
  domain: {path: domain.jsonl, validation_fraction: 0.1, test_fraction: 0.1}     # <- your domain
""",
}

TRAIN = """
train:                        # defaults of every stage
  learning_rate: 2e-3         # <- 2e-5 for a model of 7B
  steps: 200                  # <- or epochs: 2
  batch: 32                   # conversations a step, over all GPUs and accumulated micro-batches
  max_length: 64              # <- 2048: tokens of the longest conversation
  # precision: bf16           # <- on a GPU; on most CPUs fp32, the default, is far faster
  # gradient_checkpointing: true
  # lora: {r: 64, alpha: 128} # if the whole student does not fit

stages:
"""

#: By the name of the stage.
STAGES = {
    "taught": """\
  taught:                     # <- remove, and say teacher: large; the toy teacher knows nothing yet
    student: large
    data: {general: 1.0}
    loss: {next_token: 1.0}
    train: {steps: 300}
""",
    "pair": """\
  pair:                       # the student as a mixture of two experts, not trained yet
    upcycle: {model: small, experts: 2, experts_per_token: 2}
""",
    "distill": """\
  distill:                    # KD: the student follows the teacher's predictions and attention
    student: STUDENT
    teacher: taught
    data: {general: 1.0}
    loss: {prediction: 1.0, attention: 1.0}
""",
    "served": """\
  served:                     # KD from a server: its likeliest tokens are stored by `dominie cache`
    student: small            # before training, which then needs no server
    teacher: large
    data: {general: 1.0}
    loss: {prediction: 1.0}
    cache: {scheme: top, top_p: 1.0, k_max: 20}   # 20 is what vLLM returns without --max-logprobs
""",
    "written": """\
  written:                    # the teacher answers the prompts; read its licence first
    answers:
      model: taught           # <- or a name under models with an endpoint: docs/served.md
      source: general
      samples: 2
      temperature: 0.8
      max_new_tokens: 64      # <- 512; answers that are cut off are dropped
""",
    "seqkd": """\
  seqkd:                      # the student learns what the teacher wrote, word by word
    student: small
    data: {written: 1.0}
    loss: {next_token: 1.0}
""",
    "expert": """\
  expert:                     # tuned on the domain alone: it learns the domain and forgets the rest
    student: STUDENT
    data: {domain: 1.0}
    loss: {next_token: 1.0}
""",
    "align": """\
  align:                      # DAE: the domain from the expert, all else from the student as it was
    student: STUDENT
    data:
      domain: {share: 0.1, teacher: expert}
      general: {share: 0.9, teacher: STUDENT}
    loss: {prediction: 1.0}
""",
}

EVALUATE = """
evaluate:
  models: {MODELS}
  tasks:                      # the held-out conversations; see docs/evaluation.md for other metrics
"""

#: Rows of each example file.
ROWS = 600


@dataclass(frozen=True)
class Template:
    """A first recipe: purpose, sources, stages, the model that the first one trains, a teacher."""

    purpose: str
    sources: tuple[str, ...]
    stages: tuple[str, ...]
    starts_from: str = "small"
    teacher: str = TEACHER_MODEL
    runs: str = "It runs as it stands"


TEMPLATES: Mapping[str, Template] = {
    "kd": Template(
        "Knowledge distillation: a small model learns from a large one.",
        ("general",),
        ("taught", "distill"),
    ),
    "kd-dae": Template(
        "The whole method: distillation, then a domain without forgetting (KD, expert, DAE).",
        ("general", "domain"),
        ("taught", "distill", "expert", "align"),
    ),
    "dae": Template(
        "Domain Alignment from Expert: your model learns a domain and forgets nothing.",
        ("general", "domain"),
        ("expert", "align"),
    ),
    "2x7b": Template(
        "The whole method, its student a mixture of two experts.",
        ("general", "domain"),
        ("taught", "pair", "distill", "expert", "align"),
        starts_from="pair",
    ),
    "served": Template(
        "Knowledge distillation from a teacher behind a server.",
        ("general",),
        ("served",),
        teacher=SERVED_MODEL,
        runs="It runs when the server does",
    ),
    "answers": Template(
        "Distillation from text: a teacher writes answers, and a small model learns them.",
        ("general",),
        ("taught", "written", "seqkd"),
    ),
}


def start(folder: Path, template: str | None = None, *, model: str | None = None) -> list[Path]:
    """Write `recipe.yaml` and its example data into a folder.

    Args:
        folder: created if it does not exist.
        template: a name of `TEMPLATES`; None is `kd-dae`, or `dae` for a given model.
        model: to align: a folder, a GGUF file or a hub id; None begins with the toy world's.

    Returns:
        The files that were written.

    Raises:
        InputError: there is no such template, or none for a given model, a file exists already, or
            the folder cannot be written.
    """
    if template is None:
        template = "kd-dae" if model is None else "dae"
    if model is not None and template != "dae":
        raise InputError(
            "the recipe for a given model is that of its alignment to a domain",
            where="--template",
            expected="dae, or no --template",
            found=template,
            do="leave --model out, and put the model into the recipe at its arrow",
        )
    if template not in TEMPLATES:
        raise InputError(
            "no such template",
            where="--template",
            expected=f"one of {', '.join(TEMPLATES)}",
            found=template,
        )
    wanted = TEMPLATES[template]
    recipe = folder / "recipe.yaml"
    data = {source: folder / f"{source}.jsonl" for source in wanted.sources}
    for path in (recipe, *data.values()):
        if path.exists():
            raise InputError(
                "there is a file already, and it is not overwritten",
                where=str(path),
                do="name another folder, or move the file away",
            )
    name = _run_name(folder)
    if model is None:
        text = recipe_text(wanted, name=name)
    else:
        from dominie.workflows.init_model import recipe_for

        text = recipe_for(model, name=name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".init-", dir=folder) as scratch:
            for source, path in data.items():
                materialise(f"toyworld:{source}?rows={ROWS}", Path(scratch)).rename(path)
        with recipe.open("x", encoding="utf-8") as file:  # not through a link that leads nowhere
            file.write(text)
    except OSError as error:
        raise InputError(
            "the folder cannot be written", where=str(folder), found=error.strerror
        ) from None
    return [recipe, *data.values()]


def recipe_text(template: Template, *, name: str) -> str:
    """Return the YAML of a template."""
    with_teacher = {"taught", "served"} & {*template.stages}
    student = "distill" if "distill" in template.stages else template.starts_from
    models = dict.fromkeys([template.starts_from, *template.stages])
    models.pop("written", None)  # makes data
    names = ", ".join(f"{name}: {name}" for name in models)
    stages = (
        STAGES[stage].replace("STUDENT", template.starts_from if stage == "distill" else student)
        for stage in template.stages
    )
    parts = (
        [HEAD.format(purpose=template.purpose, name=name, runs=template.runs), MODELS],
        [template.teacher] if with_teacher else [],
        [DATA, *(SOURCES[source] for source in template.sources), TRAIN],
        ["\n".join(stages)],
        [EVALUATE.replace("MODELS", names)],
        [f"    {s}: {{source: {s}, metric: exact_match}}\n" for s in template.sources],
    )
    return "".join(itertools.chain(*parts))


def _run_name(folder: Path) -> str:
    """Return a valid run name made of the folder's name."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", folder.resolve().name).strip("-._")
    return name or "first"
