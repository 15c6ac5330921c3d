"""The commands `run`, `evaluate` and `cache`: runs, scores or caches what a recipe describes."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dominie.core.display import Display
from dominie.core.distributed import end_training, is_main_process
from dominie.core.errors import InputError
from dominie.core.results_file import read_results
from dominie.core.run_reader import read_stage
from dominie.recipe import Recipe, only_models
from dominie.report import write_report
from dominie.stages.evaluate import evaluate
from dominie.stages.fingerprint import changed_settings, digest
from dominie.stages.prepare import Preparation
from dominie.stages.run_folder import RunFolder, check_whole
from dominie.stages.run_stages import run_stages
from dominie.stages.server_scores import estimated
from dominie.stages.teacher_caches import (
    CachePlan,
    cache_identity,
    cache_record,
    fill_caches,
    load_planned_teacher,
    ready_plans,
)
from dominie.stages.train import PreparedTraining
from dominie.teachers.cache_sampling import CacheSettings
from dominie.workflows.model_card import write_cards

if TYPE_CHECKING:
    from dominie.data.batch import Row
    from dominie.teachers.cache_sampling import TokenStats


def run_recipe(
    recipe: Recipe,
    runs: Path,
    display: Display | None = None,
    *,
    reuse: bool = False,
    only: Sequence[str] | None = None,
) -> Path:
    """Train what is not trained, score what is not scored, write the report.

    Args:
        reuse: link stages that another run in the folder `runs` has finished.
        only: models to score, with the stages they need; None is all.

    Returns:
        The run's folder.
    """
    display = display or Display()
    folder = RunFolder(recipe, runs)
    if only:
        folder = RunFolder(only_models(recipe, only), runs, _with_finished(recipe, only, folder))
    first = is_main_process()  # judges are paid once, files written by one
    folder.check_overwrites()
    with folder.locked():
        try:
            fingerprints = run_stages(folder, display, reuse=reuse)
        finally:
            if first:  # also of stages that finished before an interruption
                write_cards(folder, scored=False)
        end_training()
        # The ranks share the questions.
        evaluate(folder, fingerprints, display, lambda: _write_report(folder))
    return folder.path


def evaluate_recipe(recipe: Recipe, runs: Path, display: Display | None = None) -> Path:
    """Score the models of a recipe whose stages have been trained; return the run's folder."""
    display = display or Display()
    folder = RunFolder(recipe, runs)
    with folder.locked():
        trained = folder.trained_fingerprints()
        for name in recipe.stages:
            record = read_stage(folder.stage(name))
            check_whole(folder.stage(name), record, display)
            _check_unchanged(folder, name, record, trained)
        evaluate(folder, trained, display, lambda: _write_report(folder))
    return folder.path


def _write_report(folder: RunFolder) -> None:
    write_cards(folder, scored=True)
    write_report(folder.path)


def _with_finished(recipe: Recipe, only: Sequence[str], folder: RunFolder) -> Recipe:
    """Return the recipe of some models, and of those that the run's folder has already."""
    if recipe.evaluate is None:
        known, there = set(recipe.stages), set(folder.trained_fingerprints())
    else:
        known, there = set(recipe.evaluate.models), set(read_results(folder.path, []))
    return only_models(recipe, [*only, *(known & there)])


def _check_unchanged(
    folder: RunFolder, name: str, record: Mapping[str, Any], trained: Mapping[str, str]
) -> None:
    """Refuse to score a stage as that of a recipe it was not made by; its card would say so.

    Raises:
        InputError: names the keys.
    """
    models = dict(trained)
    for model in folder.recipe.stages[name].models:
        if model not in folder.recipe.stages:
            with contextlib.suppress(InputError):  # one that cannot be reached decides nothing
                models[model] = digest(folder.info(model).identity())
    if apart := changed_settings(folder.recipe, name, record.get("depends", {}), models):
        raise InputError(
            f"the recipe describes another stage {name} than was made",
            where=str(folder.stage(name)),
            found="; ".join(apart),
            do="`dominie run` makes it anew; or put that back to score what is there",
        )


_SAMPLED_ROWS = 32
_COMPARED_TOKENS = 512


def cache_recipe(
    recipe: Recipe, runs: Path, display: Display | None = None, *, estimate: bool = False
) -> dict[str, Any]:
    """Store what the teachers of all stages predict, or estimate what it would cost.

    Returns:
        `caches`, a record of each; `waiting`, for each stage the stages whose models have to be
        trained before they can teach it.
    """
    display = display or Display()
    folder = RunFolder(recipe, runs)
    with folder.locked():
        checked = Preparation(folder, display).all()
        stages = [p for p in checked if isinstance(p, PreparedTraining) and p.stage.cached]
        if not stages:
            raise InputError(
                "no stage of the recipe has a cache",
                where=recipe.name,
                do=f"set stages.{_cacheable(recipe)}.cache=true",
            )
        waiting: dict[str, list[str]] = {}
        records = []
        for prepared in stages:
            plans, later = ready_plans(folder, prepared)
            if later:
                waiting[prepared.name] = later
                display.line(f"{prepared.name}: after stage {', '.join(later)}")
            if estimate:
                records += [_estimate(folder, plan, display) for plan in plans]
            else:
                caches = fill_caches(folder, prepared, display, plans, repair=True)
                records += [cache_record(plan, caches[plan.name]) for plan in plans]
    return {"caches": records, "waiting": waiting}


def _estimate(folder: RunFolder, plan: CachePlan, display: Display) -> dict[str, Any]:
    """Estimate bytes, time and fidelity of a cache, and of smaller and larger ones.

    Returns:
        Figures for JSON; `choices` holds one record for each size.
    """
    from accelerate import PartialState

    from dominie.teachers.cache_writer import batch_tokens, entries, in_batches, measure_token_stats

    if (served := folder.recipe.served.get(plan.teacher)) is not None:
        found = estimated(plan, served)
        cost = f", {found['money']:.2f} by its price" if "money" in found else ""
        display.line(
            f"{plan.stage}, {plan.teacher}: {found['requests']:,} requests of {found['tokens']:,} "
            f"tokens{cost}; {found['supervised_tokens']:,} supervised tokens of about "
            f"{found['bytes_per_token']:.0f} bytes, {_size(found['bytes'])}, and about "
            f"{_size(found['bytes_received'])} over the wire; nothing was asked"
        )
        return found
    identity = cache_identity(folder, plan)
    rows = list(plan.rows.values())
    sample = rows[:: max(1, len(rows) // _SAMPLED_ROWS)][:_SAMPLED_ROWS]
    model = load_planned_teacher(folder, plan, PartialState().device)
    tokens = sum(int(row.supervised[1:].sum()) for row in rows)
    choices = []
    with display.progress(f"{plan.stage}: {plan.teacher}, a sample") as advance:
        settings_of_choices = _neighbours(plan.settings)
        for number, settings in enumerate(settings_of_choices):
            vocabulary = measure_token_stats(
                model, sample, identity.vocabulary, settings, temperature=plan.temperature
            )
            started, written = time.monotonic(), []
            for batch in in_batches(sample, range(len(sample)), batch_tokens(model)):
                written += entries(model, batch, vocabulary, settings, temperature=plan.temperature)
            seconds = time.monotonic() - started
            seen = sum(entry.tokens for entry in written)
            per_token = sum(len(entry.code) for entry in written) / seen
            choices.append(
                {
                    **settings.identity,
                    "chosen": settings == plan.settings,
                    "bytes_per_token": round(per_token, 2),
                    "bytes": round(per_token * tokens),
                    "seconds": round(seconds / seen * tokens, 1),
                    **_fidelity(model, sample, vocabulary, settings, plan.temperature),
                }
            )
            advance(number + 1, len(settings_of_choices), "")
    _show(plan, len(rows), tokens, choices, display)
    return {
        "stage": plan.stage,
        "teacher": plan.teacher,
        "temperature": plan.temperature,
        "conversations": len(rows),
        "supervised_tokens": tokens,
        "sampled_conversations": len(sample),
        "choices": choices,
    }


def _neighbours(settings: CacheSettings) -> list[CacheSettings]:
    """Vary the settings: about half the size, as given, about double the size."""
    replace = dataclasses.replace
    match settings.scheme:
        case "threshold":
            larger = max(settings.threshold / 2, 1e-6)
            smaller = min(settings.threshold * 2, 0.5)
            others = [replace(settings, threshold=t) for t in (smaller, larger)]
        case "sampled":
            counts = (max(1, settings.samples // 2), settings.samples * 2)
            others = [replace(settings, samples=count) for count in counts]
        case "top":
            counts = (max(1, settings.k_max // 2), settings.k_max * 2)
            others = [replace(settings, k_max=count) for count in counts]
    return [others[0], settings, others[1]]


def _fidelity(
    model: Any,
    sample: Sequence[Row],
    vocabulary: TokenStats,
    settings: CacheSettings,
    temperature: float,
) -> dict[str, float | None]:
    """Measure the means over about 512 tokens of the sample."""
    import torch

    from dominie.data.batch import collate
    from dominie.teachers.cache_codec import Coder
    from dominie.teachers.cache_writer import Fidelity, entries, fidelity, tiles_of_logits
    from dominie.teachers.cached import target_of

    sums: Counter[str] = Counter()
    seen, coder = 0, Coder.of(vocabulary, settings)
    for row in sample:
        batch = collate([(0, row)]).to(model.device)
        (entry,) = entries(model, [row], vocabulary, settings, temperature=temperature)
        stored = coder.decoded(entry.code, entry.key)
        target, at = target_of([stored], model.device, vocabulary.pool_shape), 0
        with torch.no_grad():
            for logits in tiles_of_logits(model, batch, len(coder.ids), temperature):
                found = fidelity(target[at : at + len(logits)], logits)
                at += len(logits)
                for name, value in dataclasses.asdict(found).items():
                    sums[name] += value * len(logits)
                seen += len(logits)
        if seen >= _COMPARED_TOKENS:
            break
    return Fidelity(**{name: value / seen for name, value in sums.items()}).as_dict()


def _show(
    plan: CachePlan, rows: int, tokens: int, choices: Sequence[dict[str, Any]], display: Display
) -> None:
    display.line(
        f"{plan.stage}, {plan.teacher}: {rows:,} conversations, {tokens:,} supervised tokens"
    )
    for choice in choices:
        options = ", ".join(
            f"{name} {choice[name]:g}"
            for name in ("threshold", "samples", "top_p", "k_max")
            if name in choice
        )
        display.line(
            f"  {'→' if choice['chosen'] else ' '} {choice['scheme']}, {options}: "
            f"{choice['bytes_per_token']:.1f} bytes per token, {_size(choice['bytes'])}, "
            f"about {choice['seconds']:.0f} s; {choice['entries']:.0f} ids of a token, "
            f"{choice['missing_mass']:.1%} of the mass on none of them, "
            f"excess KL {choice['excess_kl']:.4f}, squared error {choice['squared_error']:.5f}"
        )


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def _cacheable(recipe: Recipe) -> str:
    """Find a stage whose teachers could be cached, to name in advice."""
    cacheable = (
        name
        for name, stage in recipe.trained.items()
        for source in stage.active
        if stage.teacher_on(source) and not stage.loss_on(source).weighs("attention")
    )
    return next(cacheable, "NAME")
