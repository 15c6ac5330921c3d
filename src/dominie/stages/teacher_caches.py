"""Writes the teacher caches of a stage: each teacher runs once over the rows of its sources."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dominie.core.display import Advance, Display
from dominie.core.distributed import init_distributed
from dominie.core.errors import RunError
from dominie.core.hardware import versions
from dominie.data.shards import ShardWriter, recover_unfinished
from dominie.data.tokenization import tokenizer_fingerprint
from dominie.generation.reply_log import call_key
from dominie.models.model_folder import base_and_adapter
from dominie.models.weights import commit, weights_fingerprint
from dominie.stages.run_folder import RunFolder
from dominie.stages.served_caches import ServedTeacher
from dominie.teachers.cache_sampling import CacheSettings

if TYPE_CHECKING:
    from dominie.data.batch import Row
    from dominie.stages.train import PreparedTraining, TrainStage
    from dominie.teachers.cache import Cache, Identity

REMEDY = "run `dominie cache` on the recipe: it computes what is missing or damaged, and no more"

_VERSIONS = ("dominie", "torch", "transformers", "numpy", "pcodec", "pyarrow")


@dataclass(frozen=True)
class CachePlan:
    """A teacher of a stage whose predictions are stored, and the rows that it needs.

    Attributes:
        prepared: the stage that needs it.
        name: of the cache, by which the sources of the stage name it.
        teacher: the recipe's name of it.
        settings: how it is stored.
        temperature: of the softmax.
        rows: the conversations, training and validation, none twice, by key.
    """

    prepared: PreparedTraining
    name: str
    teacher: str
    settings: CacheSettings
    temperature: float
    rows: dict[bytes, Row]

    @property
    def stage(self) -> str:
        """The name of the stage."""
        return self.prepared.name


def cache_plans(prepared: PreparedTraining) -> list[CachePlan]:
    """List the caches of a stage, each with the rows of its sources."""
    plans: dict[str, CachePlan] = {}
    reached = _reached_rows(prepared)
    for source in prepared.stage_sources:
        settings = prepared.stage.cache_on(source.name) if source.share else None
        if settings is None or source.cache is None or source.teacher is None:
            continue
        prediction = source.terms.prediction
        plan = plans.setdefault(
            source.cache,
            CachePlan(
                prepared=prepared,
                name=source.cache,
                teacher=source.teacher,
                settings=settings,
                temperature=prediction.temperature if prediction else 1.0,
                rows={},
            ),
        )
        train = source.train
        chosen = [train[i] for i in reached[source.name]] if reached else train
        _add(plan.rows, chosen)
        _add(plan.rows, source.validation)
    return list(plans.values())


def self_teaching_notice(name: str, stage: TrainStage) -> str | None:
    """Tell of sources whose cached teacher is the model that the student starts as."""
    held = [s for s in stage.active if stage.teacher_on(s) == stage.student]
    if not (held := [s for s in held if stage.cache_on(s) is not None]):
        return None
    return (
        f"{name}: the teacher on {', '.join(held)} is what the student starts as. Live, it "
        "holds the student until something else moves it; from a cache the student moves "
        "by itself (docs/cache.md): set cache: false there, or lower cache.threshold"
    )


def cache_identity(folder: RunFolder, plan: CachePlan) -> Identity:
    """Identify the cache that a plan needs. The teacher has to exist."""
    from dominie.teachers.cache import Identity

    if (served := folder.recipe.served.get(plan.teacher)) is not None:
        return Identity(
            teacher=plan.teacher,
            revision=None,
            weights=call_key("served", served.model),  # what it tells is in the manifest
            tokenizer=tokenizer_fingerprint(plan.prepared.tokenizer),
            vocabulary=len(plan.prepared.tokenizer),
            temperature=plan.temperature,
            scheme=plan.settings.identity,
        )
    spec, tokenizer = folder.teacher(plan.teacher), plan.prepared.tokenizer
    known = folder.info(plan.teacher).need("vocabulary", use="a teacher cache")
    return Identity(
        teacher=plan.teacher,
        revision=commit(base_and_adapter(spec)[0], spec.revision),
        weights=weights_fingerprint(spec),
        tokenizer=tokenizer_fingerprint(tokenizer),
        vocabulary=min(known, len(tokenizer)),
        temperature=plan.temperature,
        scheme=plan.settings.identity,
    )


def cache_folder(folder: RunFolder, plan: CachePlan, identity: Identity) -> Path:
    """Locate a cache: in the run's folder under its identity, or as the recipe names it."""
    teacher = re.sub(r"[^A-Za-z0-9._-]+", "-", plan.teacher).strip("-.")[-60:]
    if plan.settings.folder is not None:
        return Path(plan.settings.folder) / teacher
    return folder.path / "cache" / f"{teacher}-{identity.digest}"


def ready_plans(folder: RunFolder, prepared: PreparedTraining) -> tuple[list[CachePlan], list[str]]:
    """Select the plans whose teachers exist; list the stages that the others wait for."""
    if prepared.waits_for:
        return [], list(prepared.waits_for)
    plans = cache_plans(prepared)
    trained = folder.trained_fingerprints()
    later = {
        plan.teacher
        for plan in plans
        if plan.teacher in folder.recipe.stages
        and trained.get(plan.teacher) != prepared.teachers[plan.teacher]
    }
    return [plan for plan in plans if plan.teacher not in later], sorted(later)


def cache_record(plan: CachePlan, cache: Cache) -> dict[str, Any]:
    """Describe a cache in figures."""
    rows = cache.rows
    return {
        "stage": plan.stage,
        "teacher": plan.teacher,
        "temperature": plan.temperature,
        "folder": str(cache.folder),
        "conversations": len(plan.rows),
        "supervised_tokens": rows.tokens,
        "bytes": rows.code_bytes,
        "bytes_per_token": round(rows.code_bytes / max(rows.tokens, 1), 2),
    }


def fill_caches(
    folder: RunFolder,
    prepared: PreparedTraining,
    display: Display,
    plans: Sequence[CachePlan] | None = None,
    *,
    repair: bool = False,
) -> dict[str, Cache]:
    """Open the caches of a stage, and compute the rows that are missing.

    Several processes that `accelerate launch` started share the rows out among them.

    Args:
        prepared: the stage; its teachers exist.
        plans: some of the stage's, None is all.
        repair: whether to compute the rows of damaged shards again; else those are an error.

    Raises:
        InputError: a cache that is another's or damaged.
        RunError: the rows cannot be written.
        Interrupted: a signal came; what was computed is kept.
    """
    plans = cache_plans(prepared) if plans is None else plans
    return {plan.name: _fill(folder, plan, display, repair=repair) for plan in plans}


def _fill(folder: RunFolder, plan: CachePlan, display: Display, *, repair: bool) -> Cache:
    from dominie.teachers import cache as caches

    state = init_distributed(cpu=bool(plan.prepared.stage.train.arguments.get("use_cpu")))
    identity = cache_identity(folder, plan)
    path = cache_folder(folder, plan, identity)
    model: Any = None
    served: ServedTeacher | None = None
    is_served = plan.teacher in folder.recipe.served
    if not caches.exists(path):
        if not is_served:
            model = load_planned_teacher(folder, plan, state.device)
            _begin(path, identity, model, plan)
        elif state.is_main_process:
            served = ServedTeacher(folder, plan, display)
            vocabulary, notes = served.begin()
            caches.create(path, identity, vocabulary, versions(_VERSIONS), notes)
    if is_served:
        state.wait_for_everyone()  # for the one process that asks
    cache = caches.Cache(path, identity, remedy=REMEDY)
    if repair and state.is_main_process:
        for shard in cache.drop_damaged():
            display.line(f"{shard}: damaged; its rows are computed again")
    if saved := recover_unfinished(path, is_intact=cache.is_intact, owner=cache.owner):
        display.line(f"{path}: {saved:,} rows of an interrupted run are kept")
    state.wait_for_everyone()
    missing = [key for key in plan.rows if key not in cache.rows]
    state.wait_for_everyone()  # every rank has to see the same rows missing
    if missing:
        title = f"{plan.stage}: rows of {plan.teacher}"
        if not is_served:
            model = model or load_planned_teacher(folder, plan, state.device)
            mine = missing[state.process_index :: state.num_processes]
            with display.progress(title) as advance:
                _write(model, [plan.rows[key] for key in mine], cache, plan, advance)
        elif state.is_main_process:
            if served is None:
                served = ServedTeacher(folder, plan, display)
                served.check_same(cache)
            with display.progress(title) as advance:
                served.write([plan.rows[key] for key in missing], cache, advance)
        del model
        state.wait_for_everyone()
        cache.reread()
        left = sum(key not in cache.rows for key in missing)
        if left:
            raise RunError(
                "rows are still missing from the cache",
                where=str(path),
                found=f"{left:,} of {len(plan.rows):,}",
                do="another process has failed; run the same command again",
            )
    rows = cache.rows
    display.done(
        plan.stage,
        f"{plan.teacher} is cached: {len(plan.rows):,} conversations, {len(missing):,} of them "
        f"new; {rows.code_bytes / max(rows.tokens, 1):.1f} bytes per supervised token",
    )
    return cache


def _begin(path: Path, identity: Identity, model: Any, plan: CachePlan) -> None:
    from dominie.teachers.cache import create
    from dominie.teachers.cache_writer import measure_token_stats

    vocabulary = measure_token_stats(
        model,
        list(plan.rows.values()),
        identity.vocabulary,
        plan.settings,
        temperature=plan.temperature,
    )
    create(path, identity, vocabulary, versions(_VERSIONS))


def load_planned_teacher(folder: RunFolder, plan: CachePlan, device: Any) -> Any:
    """Load the teacher of a plan, frozen, in the tokens of the student."""
    from dominie.teachers.teacher import load_teacher

    tokenizer = plan.prepared.tokenizer
    return load_teacher(folder.teacher(plan.teacher), tokenizer=tokenizer, device=device)


def _write(
    model: Any, rows: Sequence[Row], cache: Cache, plan: CachePlan, advance: Advance
) -> None:
    """Append the rows of a cache, batch by batch; a signal ends it between two of them."""
    from dominie.teachers.cache_writer import batch_tokens, entries, in_batches
    from dominie.training.callbacks import SaveAndStop

    done = tokens = 0
    started = time.monotonic()
    stop = SaveAndStop()
    with stop.catching(), ShardWriter(cache.folder, owner=cache.owner) as writer:
        for batch in in_batches(rows, range(len(rows)), batch_tokens(model)):
            written = entries(
                model,
                batch,
                cache.vocabulary,
                plan.settings,
                temperature=plan.temperature,
                owner=cache.owner,
            )
            writer.add(written)
            done += len(batch)
            tokens += sum(entry.tokens for entry in written)
            rate = tokens / max(time.monotonic() - started, 1e-9)
            advance(done, len(rows), f"{rate:,.0f} supervised tokens/s")
            if stop.signum is not None:
                break
    stop.check(where=f"stage {plan.stage}, {done:,} of {len(rows):,} conversations cached")


def _add(rows: dict[bytes, Row], more: Sequence[Row]) -> None:
    from dominie.teachers.cached import key_of_row

    for row in more:
        if row.supervised[1:].any():
            rows.setdefault(key_of_row(row), row)


def _reached_rows(prepared: PreparedTraining) -> dict[str, list[int]] | None:
    """Find the rows of each source that training will reach; None if it is all of them."""
    from dominie.training.stage_sources import schedule_of

    settings = prepared.stage.train
    trained = [source for source in prepared.stage_sources if source.share > 0]
    schedule = schedule_of(trained, settings)
    many = schedule.steps * settings.batch >= 2 * sum(schedule.sizes.values())
    if many or settings.mixing == "micro_batches":  # whose order depends on the number of ranks
        return None
    seen: list[set[int]] = [set() for _ in trained]
    for step in schedule.mix(settings, micro_batch=settings.batch):
        for source, row in step:
            seen[source].add(row)
    return {source.name: sorted(rows) for source, rows in zip(trained, seen, strict=True)}
