"""Run folders as training and evaluation would leave them, made from a seed."""

from __future__ import annotations

import json
import math
import random
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

FAMILIES = {
    "general": ("copy", "sort", "extract", "convert", "facts", "sums", "write"),
    "domain": ("attribute", "category", "title", "stock", "price", "returns"),
}
N = {"general": 350, "domain": 300}
# model: score on general, on domain, KL to the teacher on general (nats)
SCORES = {
    "untrained": (0.0, 0.0, 5.21),
    "teacher": (0.879, 0.113, 0.0),
    "sft": (0.640, 0.060, 0.317),
    "distill": (0.769, 0.073, 0.076),
    "expert": (0.306, 0.834, 1.94),
    "align": (0.763, 0.799, 0.081),
}
VERSIONS = {"dominie": "0.1.0", "torch": "2.13.0+cpu", "transformers": "5.23.0", "python": "3.11.2"}
# stage: student, teachers by source, terms, steps, share by source, seconds
STAGES: dict[str, Any] = {
    "teacher": (
        "toyworld:teacher",
        {"general": None},
        ("next_token",),
        1500,
        {"general": 1.0},
        104,
    ),
    "sft": ("untrained", {"general": None}, ("next_token",), 600, {"general": 1.0}, 24.6),
    "distill": (
        "untrained",
        {"general": "teacher"},
        ("prediction", "attention"),
        600,
        {"general": 1.0},
        25.8,
    ),
    "expert": ("distill", {"domain": None}, ("next_token",), 300, {"domain": 1.0}, 11.2),
    "align": (
        "distill",
        {"domain": "expert", "general": "distill"},
        ("prediction",),
        800,
        {"domain": 0.1, "general": 0.9},
        59.4,
    ),
}
RECIPE = """\
name: quickstart
models:
  untrained: {path: 'toyworld:student'}
data:
  general: {path: 'toyworld:general', validation_fraction: 0.05, test_fraction: 0.2}
  domain: {path: 'toyworld:domain', validation_fraction: 0.05, test_fraction: 0.2}
train: {learning_rate: 0.002, batch: 32, max_length: 32, precision: fp32, seed: 0}
stages:
  teacher: {student: 'toyworld:teacher', data: {general: 1.0}, loss: {next_token: 1.0}}
  sft: {student: untrained, data: {general: 1.0}, loss: {next_token: 1.0}}
  distill:
    student: untrained
    teacher: teacher
    data: {general: 1.0}
    loss: {prediction: 1.0, attention: 3.0}
  expert: {student: distill, data: {domain: 1.0}, loss: {next_token: 1.0}}
  align:
    student: distill
    data:
      domain: {share: 0.1, teacher: expert}
      general: {share: 0.9, teacher: distill}
    loss: {prediction: 1.0}
"""
_WORDS = ("lamp", "kettle", "scarf", "desk", "ring", "boots", "radio", "vase", "tent", "drum")


def quickstart(folder: Path, *, seed: int = 0) -> Path:
    """The whole quickstart: six models, five stages, two tasks by family."""
    random_ = random.Random(seed)
    run = folder / "quickstart"
    run.mkdir(parents=True)
    (run / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    for name in STAGES:
        write_stage(run, name, random_)
    write_json(run / "results.json", write_evaluation(run, random_))
    return run


CATEGORIES = (
    "writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities"
)  # fmt: skip
# model: mean rating, win rate, win rate at equal length
JUDGED = {
    "teacher": (8.1, 0.92, 0.88),
    "sft": (5.9, 0.61, 0.55),
    "distill": (6.8, 0.78, 0.69),
    "align": (6.9, 0.77, 0.71),
}


def judged(folder: Path, *, seed: int = 0) -> Path:
    """The quickstart with MT-Bench and AlpacaEval beside it, as a judge leaves them."""
    run = quickstart(folder, seed=seed)
    random_ = random.Random(seed + 1)
    results = json.loads((run / "results.json").read_text())
    prompts = [f"{category}: question {i}" for category in CATEGORIES for i in range(3)]
    for model, (rating, win_rate, controlled) in JUDGED.items():
        groups = {
            category: entry(min(1.0, rating / 10 + random_.uniform(-0.2, 0.15)), 0.05, 20)
            for category in CATEGORIES
        }
        mean = sum(group["score"] for group in groups.values()) / len(groups)
        results[model]["mt-bench"] = {
            **entry(mean, 0.02, 160),
            "metric": "mt_bench",
            "interval": [mean - 0.05, mean + 0.04],
            "groups": groups,
            "rating": 10 * mean,
            "unscored": 0,
            "turns": {"1": mean + 0.03, "2": mean - 0.03},
            "controls": {
                "empty": {"score": 0.1, "unscored": 0},
                "constant": {"score": 0.31, "unscored": 1},
                "length_only": {"correlation": 0.4},
            },
            "warnings": ["the judge is of the model's family: mistral"] if model == "sft" else [],
        }
        results[model]["alpaca-eval"] = {
            **entry(win_rate, 0.015, 805),
            "metric": "alpaca_eval",
            "interval": [win_rate - 0.03, win_rate + 0.028],
            "win_rate": win_rate,
            "length_controlled_win_rate": controlled,
            "length_controlled_stderr": 0.01,
            "length_control": "no difficulty",
            "excluded": 3,
            "controls": {"empty": {"score": 0.0}, "length_only": {"longer_answer_wins": 0.7}},
        }
        rows = [
            {
                "prompt": prompt,
                "target": "",
                "output": f"An answer of {model} to {prompt}.",
                "group": prompt.partition(":")[0],
                "score": min(1.0, max(0.1, round(random_.gauss(rating, 1.5)) / 10)),
                "verdict": f"The answer of {model} is fair.\nRating: [[7]]",
            }
            for prompt in prompts
        ]
        write_lines(run / "evaluation" / model / "mt-bench.jsonl", rows)
    write_json(run / "results.json", results)
    write_comparisons(run, results)
    return run


def write_comparisons(run: Path, results: dict[str, Any], baseline: str = "sft") -> None:
    """Differences on the same questions, narrower than the two intervals together."""
    differences: dict[str, Any] = {}
    for task in ("general", "domain", "mt-bench", "alpaca-eval"):
        models = [model for model in results if task in results[model]]
        for i, model in enumerate(models):
            for other in models[i + 1 :]:
                value = results[model][task]["score"] - results[other][task]["score"]
                half = 1.96 * results[model][task]["stderr"]
                differences.setdefault(task, {}).setdefault(model, {})[other] = {
                    "difference": value,
                    "interval": [value - half, value + half],
                    "verdict": "within noise" if abs(value) <= half else "better",
                }
    comparisons = {"baseline": baseline, "differences": differences}
    write_json(run / "evaluation" / "comparisons.json", comparisons)


def write_stage(run: Path, name: str, random_: random.Random) -> None:
    student, teachers, _, steps, shares, seconds = STAGES[name]
    teacher_model = name == "teacher"
    rows = {"general": 1600, "domain": 1200}
    data = {
        source: {
            "read": rows[source] + 84,
            "removed_duplicates": 31,
            "removed_held_out": 53,
            "truncated": 0,
            "too_long": 2 if source == "domain" else 0,
            "kept": rows[source],
            "train": rows[source] - 40 - N[source],
            "validation": 40,
            "test": N[source],
            "share": share,
            "token_share": share + (0.5 - share) * 0.06 if len(shares) > 1 else 1.0,
            "loss_share": share + (0.5 - share) * 0.06 if len(shares) > 1 else 1.0,
        }
        for source, share in shares.items()
    }
    write_json(
        run / name / "stage.json",
        {
            "name": name,
            "status": "done",
            "fingerprint": "5f1c",
            "kind": "train",
            "student": student,
            "teachers": teachers,
            "steps": steps,
            "supervised_tokens": steps * 187,
            "seconds": seconds,
            "parameters": 1_062_528 if teacher_model else 393_120,
            "trainable_parameters": 1_062_528 if teacher_model else 393_120,
            "data": data,
            "final": {"loss": 0.1},
            "versions": VERSIONS,
        },
    )
    lines = [*_train_lines(name, random_), *_evaluation_lines(name, random_)]
    lines.sort(key=lambda line: line["step"])
    write_lines(run / name / "metrics.jsonl", lines)


def write_evaluation(run: Path, random_: random.Random) -> dict[str, Any]:
    """Answers of every model to every prompt, and the results counted from them."""
    results: dict[str, Any] = {}
    for column, task in enumerate(FAMILIES):
        prompts = [_prompt(task, index, random_) for index in range(N[task])]
        hardness = [random_.random() for _ in prompts]
        for model, scores in SCORES.items():
            rows = [
                _answer(row, model, hard + random_.gauss(0, 0.12) < scores[column], random_)
                for row, hard in zip(prompts, hardness, strict=True)
            ]
            write_lines(run / "evaluation" / model / f"{task}.jsonl", rows)
            entry = {**score([row["correct"] for row in rows]), "metric": "exact_match"}
            entry["groups"] = {
                family: score([row["correct"] for row in rows if row["group"] == family])
                for family in FAMILIES[task]
            }
            results.setdefault(model, {})[task] = entry
    for model, (_, _, divergence) in SCORES.items():
        agreed = math.exp(-divergence)
        results[model]["agreement"] = {
            "score": agreed,
            "stderr": 0.5 * math.sqrt(agreed * (1 - agreed) / N["general"]),
            "n": N["general"],
            "metric": "agreement",
            "kl": divergence,
            "loss": 0.31 + divergence,
        }
    return results


def score(correct: list[bool]) -> dict[str, Any]:
    """A mean of right answers as `results.json` has it."""
    mean = sum(correct) / len(correct)
    return {
        "score": mean,
        "stderr": math.sqrt(mean * (1 - mean) / len(correct)),
        "n": len(correct),
    }


def entry(score_: float, stderr: float | None = 0.02, n: int = 400, **more: Any) -> dict[str, Any]:
    """A task's entry in `results.json`."""
    return {"score": score_, "stderr": stderr, "n": n, "metric": "exact_match", **more}


def write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1), encoding="utf-8")


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _train_lines(name: str, random_: random.Random) -> list[dict[str, Any]]:
    _, teachers, terms, steps, shares, seconds = STAGES[name]
    high = {"next_token": 5.6, "prediction": 4.8, "attention": 1.1}
    low = {"next_token": 0.31, "prediction": 0.07, "attention": 0.012}
    if name in ("expert", "align"):
        high = {"next_token": 4.1, "prediction": 0.9}
    lines = []
    for step in range(10, steps + 1, 10):
        decay = math.exp(-6.0 * step / steps)
        values = {
            term: (low[term] + (high[term] - low[term]) * decay) * random_.lognormvariate(0, 0.08)
            for term in terms
        }
        loss = sum(values.values())
        sources = {source: {"tokens": int(187 * share)} for source, share in shares.items()}
        for source, teacher in teachers.items():
            if teacher:
                sources[source]["divergence"] = values["prediction"] * random_.uniform(0.8, 1.2)
        lines.append(
            {
                "step": step,
                "epoch": step / 50,
                "loss": loss,
                "learning_rate": 0.002 * (1 - step / steps),
                "grad_norm": 1.0,
                "terms": values,
                "sources": sources,
                "tokens": step * 187,
                "tokens_per_second": 4400.0,
                "seconds": seconds * step / steps,
            }
        )
    return lines


def _evaluation_lines(name: str, random_: random.Random) -> list[dict[str, Any]]:
    """Held-out loss by source: `expert` forgets, `align` does not."""
    _, teachers, _, steps, _, seconds = STAGES[name]
    starts, ends = {
        "teacher": ((5.7, 5.7), (0.22, 3.9)),
        "sft": ((5.7, 5.7), (0.62, 4.2)),
        "distill": ((5.7, 5.7), (0.41, 4.1)),
        "expert": ((0.41, 4.1), (2.6, 0.29)),
        "align": ((0.41, 4.1), (0.43, 0.34)),
    }[name]
    lines = []
    for step in range(0, steps + 1, steps // 12):
        part = 1 - math.exp(-5.0 * step / steps)
        evaluation: dict[str, Any] = {}
        for index, source in enumerate(FAMILIES):
            loss = starts[index] + (ends[index] - starts[index]) * part
            loss *= random_.lognormvariate(0, 0.015)
            evaluation[source] = {"loss": loss, "next_token": loss, "tokens": 2400}
            if teachers.get(source):
                evaluation[source]["divergence"] = 0.06 + 0.8 * (1 - part) * (1 + index)
                evaluation[source]["agreement"] = 0.5 + 0.45 * part
        lines.append({"step": step, "evaluation": evaluation, "seconds": seconds * step / steps})
    return lines


def _prompt(task: str, index: int, random_: random.Random) -> dict[str, str]:
    family = FAMILIES[task][index % len(FAMILIES[task])]
    words = random_.sample(_WORDS, 4)
    number = random_.randint(11, 98)
    if task == "general":
        prompt, target = {
            "copy": (f"say again : {' '.join(words)}", " ".join(words)),
            "sort": (f"sort : {' '.join(words)}", " ".join(sorted(words))),
            "extract": (f"the {words[0]} is {words[1]} . what is it ?", f"it is {words[1]}"),
            "convert": (f"{number} m in cm ?", f"it is {number * 100} cm"),
            "facts": (f"where is the {words[2]} made ?", f"the {words[2]} is made in oslo"),
            "sums": (f"{number} + {number % 7} ?", f"the sum is {number + number % 7}"),
            "write": (f"thank ana for the {words[3]}", f"dear ana , thank you for the {words[3]}"),
        }[family]
    else:
        prompt, target = (
            f"{family} of red {words[0]} no {number} ?",
            f"{family} : {words[1]} {number}",
        )
    return {"prompt": prompt, "target": target, "group": family}


def _answer(
    row: dict[str, str], model: str, correct: bool, random_: random.Random
) -> dict[str, Any]:
    words = row["target"].split()
    if not correct and model == "untrained":
        words = random_.choices(_WORDS, k=5)
    elif not correct:
        words[random_.randrange(len(words))] = random_.choice(_WORDS)
        correct = words == row["target"].split()
    return {
        "prompt": row["prompt"],
        "target": row["target"],
        "output": " ".join(words),
        "correct": correct,
        "group": row["group"],
    }
