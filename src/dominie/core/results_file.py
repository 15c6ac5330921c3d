"""The results of a run: sealed when written, and read without what no longer holds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dominie.core.errors import InputError
from dominie.core.io import (
    file_manifest,
    finite,
    is_inside,
    manifest_error,
    mapping,
    text,
    write_checksummed,
    write_json,
)
from dominie.core.run_reader import fault, read_object
from dominie.core.task_result import Interval

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

RESULTS, COMPARISONS = "results.json", "evaluation/comparisons.json"
SEAL = "evaluation/scored.json"
"""What these files were when they were written, and which stages they are of."""


def write_results(
    run: Path,
    results: Mapping[str, Any],
    baseline: str,
    differences: Mapping[str, Any],
    seal: Mapping[str, Any],
) -> None:
    """Write the results of a run, and last the seal that vouches for them.

    Args:
        seal: `models` and `tasks`, each by name with the fingerprints of its `stages`; and
            `sources`, that of each task.
    """
    (run / COMPARISONS).parent.mkdir(parents=True, exist_ok=True)  # no model may have answered
    write_json(run / COMPARISONS, {"baseline": baseline, "differences": differences})
    write_json(run / RESULTS, results)
    files = file_manifest(run, [run / RESULTS, run / COMPARISONS])
    write_checksummed(run / SEAL, {"files": files, **seal})


def kept_result(path: Path, fingerprint: str) -> dict[str, Any] | None:
    """Return what was scored before and still holds; None if nothing does or can be read."""
    try:
        kept = read_object(path)
        whole = manifest_error(path.parent, kept.get("samples", {})) is None
        if whole and kept["fingerprint"] == fingerprint and 0 <= kept["result"]["score"] <= 1:
            result: dict[str, Any] = kept["result"]
            return result
    except (InputError, OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    return None


def with_others(
    run: Path,
    names: Mapping[str, str],
    results: Mapping[str, dict[str, Any]],
    seal: dict[str, Any],
) -> dict[str, dict[str, Any]]:
    """Return results with those of other models that were written before and still hold.

    Args:
        names: all that may be in the results, in order: what each is, by its name.
        results: new ones.
        seal: of these; what is kept is added.
    """
    try:
        before, sealed = read_results(run), read_object(run / SEAL)
    except InputError:
        return dict(results)  # damaged: scored again when they are asked for
    found = {}
    for name, model in names.items():
        of = mapping(mapping(sealed.get("models")).get(name))
        if name in results:
            found[name] = results[name]
        elif name in before and of.get("model") == model:
            asked = mapping(sealed.get("tasks"))
            tasks = {
                task: result
                for task, result in before[name].items()
                if task in seal["tasks"] and asked.get(task) == seal["tasks"][task]
            }
            if tasks:
                found[name], seal["models"][name] = tasks, of
    return found


def read_results(run: Path, notes: list[str] | None = None) -> dict[str, dict[str, dict[str, Any]]]:
    """`results.json` of a run: model → task → the figures; empty if nothing is evaluated.

    Figures of a stage that has been made anew since are left out.

    Raises:
        InputError: it is there and cannot be read, is not as it was written, or holds anything but
            figures.
    """
    path = run / "results.json"
    results = read_object(path, notes)
    for model, tasks in list(results.items()):
        if notes is None and not _are_figures(tasks):
            fault(path, f"no figures of {model}", notes)
        results[model] = {k: v for k, v in mapping(tasks).items() if isinstance(v, dict)}
    if not results:
        return results
    seal = read_object(run / SEAL, notes)
    _check_sealed(run, "results.json", seal, notes)
    for model, of in mapping(seal.get("models")).items():
        if model in results and (stage := _made_anew(run, of)):
            del results[model]
            if notes is not None:
                notes.append(
                    f"The scores of {model} in results.json are of an earlier stage {stage}; they "
                    "are left out until `dominie run` or `dominie evaluate` scores it again."
                )
    for task, of in mapping(seal.get("tasks")).items():
        if stage := _made_anew(run, of):
            results = {m: {t: e for t, e in by.items() if t != task} for m, by in results.items()}
            if notes is not None:
                notes.append(
                    f"The scores on {task} in results.json were measured with an earlier stage "
                    f"{stage}; they are left out."
                )
    return {model: tasks for model, tasks in results.items() if tasks or not seal}


def _are_figures(tasks: object) -> bool:
    return isinstance(tasks, dict) and all(
        finite(mapping(entry).get("score")) is not None for entry in tasks.values()
    )


def _check_sealed(run: Path, name: str, seal: Mapping[str, Any], notes: list[str] | None) -> bool:
    """Whether a file is as the seal has it, or there is no seal; else note it or raise."""
    try:
        files = seal.get("files", {})
        found = manifest_error(run, {name: files[name]} if name in files else {})
    except (ValueError, KeyError, TypeError, AttributeError):
        found = f"{SEAL} is damaged"
    if found is None:
        return True
    if notes is None:
        fault(run / name, found, notes)
    else:
        notes.append(f"{found}; what {name} says may not be what was measured.")
    return False


def _made_anew(run: Path, of: object) -> str | None:
    """A stage that is another than it was; one whose folder is gone contradicts nothing."""
    for stage, fingerprint in mapping(mapping(of).get("stages")).items():
        record = read_object(run / stage / "stage.json", []) if is_inside(stage) else {}
        if record and record.get("fingerprint") != fingerprint:
            return str(stage)
    return None


def read_task_sources(run: Path) -> dict[str, str]:
    """The source of each task's questions, as far as the seal says."""
    sources = mapping(read_object(run / SEAL, []).get("sources"))
    return {task: source for task, source in sources.items() if isinstance(source, str)}


def read_comparisons(
    run: Path, notes: list[str]
) -> tuple[str | None, dict[str, dict[tuple[str, str], Interval]]]:
    """The baseline, and by task the differences of models on the same questions."""
    content = read_object(run / COMPARISONS, notes)
    unread = not content and (run / COMPARISONS).exists()  # noted already
    if not unread and not _check_sealed(run, COMPARISONS, read_object(run / SEAL, []), notes):
        content = {}  # without it, intervals decide, which claims less
    found: dict[str, dict[tuple[str, str], Interval]] = {}
    for task, by_model in mapping(content.get("differences")).items():
        for model, others in mapping(by_model).items():
            for other, entry in mapping(others).items():
                given = mapping(entry)
                difference = Interval.from_ends(given.get("difference"), given.get("interval"))
                if difference is not None:
                    found.setdefault(task, {})[model, other] = difference
    return text(content.get("baseline")), found
