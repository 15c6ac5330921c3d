"""Reads a run folder: whatever can be read is read, whatever cannot becomes a note."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dominie.core.errors import InputError
from dominie.core.json_values import finite, mapping, numbers, numbers_by_name, sequence, text
from dominie.core.run_records import (
    JUDGED,
    Difference,
    EvaluationLine,
    Run,
    Sample,
    Score,
    Stage,
    TrainLine,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path


def read_object(path: Path, notes: list[str]) -> dict[str, Any]:
    """The JSON object in a file; empty, with a note, where there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except (OSError, ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        notes.append(f"{place(path)} could not be read; it is left out.")
        return {}
    return content


def read_lines(
    path: Path, notes: list[str], maximum: int | None = None
) -> Iterator[dict[str, Any]]:
    """The objects of a file of JSON lines, without those that a crash cut in two.

    A file that is not there has no lines: that is for the caller to remark on.
    """
    try:
        lines = path.open(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return
    except (OSError, ValueError):  # a name the file system refuses, or a file not ours to read
        notes.append(f"{place(path)} could not be opened; it is left out.")
        return
    unreadable = 0
    with lines:
        for number, line in enumerate(lines):
            if maximum is not None and number >= maximum:
                notes.append(f"Of {place(path)} only the first {maximum:,} rows were read.")
                break
            try:
                content = json.loads(line) if line.strip() else None
            except (ValueError, RecursionError):
                unreadable += 1
                continue
            if isinstance(content, dict):
                yield content
    if unreadable:
        notes.append(
            f"{unreadable:,} line{'s' if unreadable > 1 else ''} of {place(path)} could not be "
            "read, cut off by a crash perhaps."
        )


def place(path: Path) -> str:
    """A file as people name it inside a run folder."""
    parts = path.parts
    if "evaluation" in parts:
        return "/".join(parts[parts.index("evaluation") :])
    return path.name if path.name == "results.json" else "/".join(parts[-2:])


_SCORE_KEYS = {"score", "stderr", "n", "metric", "groups"}
_JUDGED_KEYS = {"length_controlled_win_rate"}  # of a judge's many figures, those for a table
_MAXIMUM_SAMPLES = 5000
_MAXIMUM_RECIPE = 60_000


def read_run(path: Path) -> Run:
    """The contents of a run folder.

    Raises:
        InputError: the folder is missing, or holds nothing that a run writes.
    """
    path = Path(path)
    if not path.is_dir():
        raise InputError(
            "there is no such run folder",
            where=str(path),
            expected="a folder that `dominie run` made, runs/NAME",
            do="look in runs/, or run the recipe first",
        )
    notes: list[str] = []
    results = _read_results(path / "results.json", notes)
    stages = _in_dependency_order(_read_stages(path, notes), list(results))
    recipe = _read_recipe(path / "recipe.yaml", notes)
    if not results and not stages and recipe is None:
        raise InputError(
            "this folder is not a run",
            where=str(path),
            expected="recipe.yaml, results.json, or folders of stages",
            do="name the folder of one run, runs/NAME",
        )
    samples = _read_samples(path / "evaluation", results, notes)
    baseline, differences = _read_comparisons(path / "evaluation" / "comparisons.json", notes)
    return Run(
        path.resolve().name,
        path,
        results,
        stages,
        samples,
        recipe,
        tuple(notes),
        differences,
        baseline if baseline in results else None,
    )


def _read_results(path: Path, notes: list[str]) -> dict[str, dict[str, Score]]:
    if not path.is_file():
        notes.append("Nothing has been evaluated yet: there is no results.json.")
        return {}
    results: dict[str, dict[str, Score]] = {}
    for model, tasks in read_object(path, notes).items():
        if not mapping(tasks):
            notes.append(f"results.json holds no score of {model}.")
        for task, entry in mapping(tasks).items():
            score = _score(mapping(entry))
            if score is None:
                notes.append(f"results.json holds no finite score of {model} on {task}.")
            else:
                results.setdefault(model, {})[task] = score
    return results


def _score(entry: Mapping[str, Any]) -> Score | None:
    score = finite(entry.get("score"))
    if score is None:
        return None
    stderr, n = finite(entry.get("stderr")), finite(entry.get("n"))
    metric = text(entry.get("metric")) or ""
    controls = {name: _control(value) for name, value in mapping(entry.get("controls")).items()}
    return Score(
        score,
        stderr=None if stderr is None else abs(stderr),
        n=None if n is None else int(n),
        metric=metric,
        groups={
            name: group
            for name, group_entry in mapping(entry.get("groups")).items()
            if (group := _score(mapping(group_entry))) is not None
        },
        extras={
            key: value
            for key, value in numbers(entry).items()
            if (key in _JUDGED_KEYS if metric in JUDGED else key not in _SCORE_KEYS)
            and math.isfinite(value)
        },
        interval=_pair(entry.get("interval")),
        measure=text(entry.get("measure")) or "",
        controls={name: value for name, value in controls.items() if value is not None},
        warnings=tuple(each for each in sequence(entry.get("warnings")) if isinstance(each, str)),
    )


def _control(value: object) -> float | None:
    """The score of a control, given as it is or among other figures."""
    return finite(mapping(value).get("score")) if isinstance(value, dict) else finite(value)


def _pair(value: object) -> tuple[float, float] | None:
    """Two finite numbers in order."""
    ends = [finite(end) for end in sequence(value)]
    if len(ends) != 2 or ends[0] is None or ends[1] is None or ends[0] > ends[1]:
        return None
    return ends[0], ends[1]


def _read_comparisons(
    path: Path, notes: list[str]
) -> tuple[str | None, dict[str, dict[tuple[str, str], Difference]]]:
    """The baseline, and by task how models differ from each other."""
    if not path.is_file():
        return None, {}
    content = read_object(path, notes)
    found: dict[str, dict[tuple[str, str], Difference]] = {}
    for task, by_model in mapping(content.get("differences")).items():
        for model, others in mapping(by_model).items():
            for other, entry in mapping(others).items():
                value, ends = finite(mapping(entry).get("difference")), None
                if value is not None and (ends := _pair(mapping(entry).get("interval"))):
                    found.setdefault(task, {})[model, other] = Difference(value, *ends)
    return text(content.get("baseline")), found


def _read_stages(run: Path, notes: list[str]) -> dict[str, Stage]:
    stages: dict[str, Stage] = {}
    for folder in sorted(child for child in run.iterdir() if child.is_dir()):
        described, measured = folder / "stage.json", folder / "metrics.jsonl"
        if folder.name == "evaluation" or not (described.is_file() or measured.is_file()):
            continue
        stage = read_object(described, notes) if described.is_file() else {}
        if stage.get("status") != "done":
            notes.append(f"Stage {folder.name} has not finished; what it logged so far is shown.")
        train, evaluations = _read_metrics(measured, notes)
        so_far = train[-1].values if train else {}
        stages[folder.name] = Stage(
            name=folder.name,
            status=text(stage.get("status")) or "unfinished",
            kind=text(stage.get("kind")) or "train",
            student=text(stage.get("student")),
            teachers={
                source: text(teacher) for source, teacher in mapping(stage.get("teachers")).items()
            },
            steps=finite(stage.get("steps", so_far.get("step"))),
            supervised_tokens=finite(stage.get("supervised_tokens", so_far.get("tokens"))),
            seconds=finite(stage.get("seconds", so_far.get("seconds"))),
            parameters=finite(stage.get("parameters")),
            trainable_parameters=finite(stage.get("trainable_parameters")),
            data={source: numbers(counts) for source, counts in mapping(stage.get("data")).items()},
            versions={
                package: str(version) for package, version in mapping(stage.get("versions")).items()
            },
            train=train,
            evaluations=evaluations,
        )
    return stages


def _read_metrics(
    path: Path, notes: list[str]
) -> tuple[tuple[TrainLine, ...], tuple[EvaluationLine, ...]]:
    """The two kinds of line of a `metrics.jsonl`, by step.

    A stage that was cut off and resumed logs some steps twice; the later line is the one whose
    weights lived on.
    """
    train: dict[float, TrainLine] = {}
    evaluations: dict[float, EvaluationLine] = {}
    for line in read_lines(path, notes):
        step = finite(line.get("step"))
        if step is None:
            continue
        if "evaluation" in line:
            by_source = numbers_by_name(line["evaluation"])
            evaluations[step] = EvaluationLine(step, by_source)
        else:
            by_source = numbers_by_name(line.get("sources"))
            train[step] = TrainLine(step, numbers(line), numbers(line.get("terms")), by_source)
    unfit = sum(not math.isfinite(line.values.get("loss", 0.0)) for line in train.values())
    if unfit:
        notes.append(
            f"The loss of stage {path.parent.name} was not finite at {unfit:,} logged "
            f"step{'s' if unfit > 1 else ''}; the curve has a gap there."
        )
    return (
        tuple(train[step] for step in sorted(train)),
        tuple(evaluations[step] for step in sorted(evaluations)),
    )


def _read_samples(
    folder: Path, results: Mapping[str, Mapping[str, Score]], notes: list[str]
) -> dict[str, dict[str, tuple[Sample, ...]]]:
    samples: dict[str, dict[str, tuple[Sample, ...]]] = {}
    for model, scores in results.items():
        for task in scores:
            rows = tuple(
                Sample(
                    text(row.get("prompt")) or "",
                    text(row.get("target")) or "",
                    text(row.get("output")) or "",
                    _worth(row),
                    text(row.get("group")),
                    text(row.get("verdict")),
                    row.get("invalid") is True,
                )
                for row in read_lines(folder / model / f"{task}.jsonl", notes, _MAXIMUM_SAMPLES)
            )
            if rows:
                samples.setdefault(task, {})[model] = rows
    return samples


def _worth(row: Mapping[str, Any]) -> float | None:
    """What an answer was worth, from 0 to 1."""
    if (score := finite(row.get("score"))) is not None:
        return min(1.0, max(0.0, score))
    if (preference := finite(row.get("preference"))) is not None:  # from 1 to 2, as AlpacaEval's
        return min(1.0, max(0.0, preference - 1.0))
    ratings = [r for each in sequence(row.get("ratings")) if (r := finite(each)) is not None]
    if ratings:  # from 1 to 10, one a turn, as MT-Bench's
        return min(1.0, max(0.0, math.fsum(ratings) / len(ratings) / 10))
    return float(row["correct"]) if isinstance(row.get("correct"), bool) else None


def _read_recipe(path: Path, notes: list[str]) -> str | None:
    if not path.is_file():
        notes.append("The resolved recipe is missing: there is no recipe.yaml.")
        return None
    recipe = path.read_text(encoding="utf-8", errors="replace")
    if len(recipe) > _MAXIMUM_RECIPE:
        notes.append(f"The recipe is shown in part: its first {_MAXIMUM_RECIPE:,} characters.")
    return recipe[:_MAXIMUM_RECIPE]


def _in_dependency_order(stages: dict[str, Stage], models: list[str]) -> dict[str, Stage]:
    """Students after the stages that made them and their teachers, otherwise as in the results."""
    ordered: dict[str, Stage] = {}

    def add(name: str, above: frozenset[str]) -> None:
        if name in ordered or name in above or name not in stages:
            return
        stage = stages[name]
        for needed in (stage.student, *stage.teacher_names):
            if needed:
                add(needed, above | {name})
        ordered[name] = stage

    for name in (*models, *stages):
        add(name, frozenset())
    return ordered
