"""The parts of a first recipe: each is said once, and a template is the parts it needs."""

from __future__ import annotations

HEAD = """\
# {purpose}
#
#     dominie check recipe.yaml     reads every model, template and row; trains nothing
#     dominie run recipe.yaml       trains, scores, and writes runs/{name}/report.html
#
# It runs as it stands, on tiny models and the example data beside it. Then put your own models and
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
train:                        # for every stage that does not say otherwise
  learning_rate: 2e-3         # <- 2e-5 for a model of 7B
  steps: 200                  # <- or epochs: 2
  batch: 32                   # conversations a step, over all GPUs and accumulated micro-batches
  max_length: 64              # <- 2048: tokens of the longest conversation
  # precision: bf16           # <- on a GPU
  # gradient_checkpointing: true
  # lora: {r: 64, alpha: 128} # where the whole student does not fit

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

TASKS = {
    "general": "    general: {source: general, metric: exact_match}\n",
    "domain": "    domain: {source: domain, metric: exact_match}\n",
}
