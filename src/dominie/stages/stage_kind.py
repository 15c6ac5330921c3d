"""Base class of the kinds of stage: how they are prepared, run, planned and described."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

from dominie.core.distributed import broadcast_from_main, is_main_process
from dominie.core.errors import InputError
from dominie.core.io import empty_folder
from dominie.core.whole_folders import publish, writing
from dominie.recipe.stage_config import StageConfig, span_sources

if TYPE_CHECKING:
    from dominie.core.display import Display
    from dominie.data.rows import PreparedSource
    from dominie.models.spec import Model
    from dominie.recipe import TrainStage
    from dominie.recipe.schema import Recipe
    from dominie.stages.prepare import Preparation
    from dominie.stages.run_folder import RunFolder
    from dominie.teachers.paired_rows import PairedRows


@dataclass(frozen=True)
class Prepared:
    """A stage that was checked as far as it can be before it is run.

    Attributes:
        name: of the stage.
        stage: its part of the recipe.
        tokenizer: of the model it makes, with a chat template; None if it makes data.
        fingerprint: of everything its result depends on; empty while that is not known.
        depends: the same by key, to name what has changed.
        sources: the tokenised sources it reads, by name.
        waits_for: stages that have to make data before the rest can be checked.
        pairs: the rows in the tokens of teachers that are compared with by spans, by their names.
    """

    name: str
    stage: StageKind
    tokenizer: Any
    fingerprint: str
    depends: Mapping[str, Any] = field(default_factory=dict, kw_only=True)
    sources: Mapping[str, PreparedSource] = field(default_factory=dict, kw_only=True)
    waits_for: tuple[str, ...] = field(default=(), kw_only=True)
    pairs: Mapping[str, PairedRows] = field(default_factory=dict, kw_only=True)


@dataclass
class StageRun:
    """A stage that is being run.

    Attributes:
        folder: of the run.
        prepared: the stage; everything it reads exists.
        record: the content of `stage.json` so far.
        earlier: the content of `stage.json` if the same stage was interrupted, else empty.
        display: shows progress.
    """

    folder: RunFolder
    prepared: Prepared
    record: dict[str, Any]
    earlier: Mapping[str, Any]
    display: Display

    @property
    def name(self) -> str:
        """The name of the stage."""
        return self.prepared.name

    @property
    def path(self) -> Path:
        """The folder of the stage."""
        return self.folder.stage(self.name)

    def begin(self, **known: Any) -> None:
        """Write `stage.json` with the status `running`, and more that is known before the end."""
        from dominie.stages.run_folder import write_stage

        self.record |= known
        if is_main_process():
            write_stage(self.path, self.record)

    @contextlib.contextmanager
    def result(self) -> Iterator[Path]:
        """Context manager: a folder for the model or the data; at the end it appears as a whole."""
        makes = self.prepared.stage.makes
        scratch = self.path / f".writing-{makes}"
        empty_folder(scratch)
        with writing(scratch):
            yield scratch
            publish(scratch, self.path / makes)


class StageKind(StageConfig):
    """A kind of stage: its keys are the fields of a dataclass that derives from this.

    A kind that makes data writes them as JSON lines within `run.result()`; later stages and tasks
    name the stage as they name a source.
    """

    past: ClassVar[str] = "made"

    @property
    def names_in_record(self) -> dict[str, Any]:
        """Entries of `stage.json` with the models that the stage reads, by the recipe's names."""
        return {"student": self.models[0]} if self.models else {}

    def prepare(self, name: str, preparation: Preparation) -> Prepared:
        """Check a stage and find its fingerprint: settings, models, content of its sources.

        What it reads may not exist yet: see `Preparation`.

        Raises:
            InputError: models, sources or settings that do not go together.
        """
        from dominie.stages.fingerprint import digest, making_dependencies, making_parts

        contents = {source: preparation.content(source) for source in self.sources}
        parts = making_parts(preparation.recipe, name, preparation.fingerprints, contents)
        depends = making_dependencies(*parts)
        return Prepared(name, self, None, digest(*parts), depends=depends)

    def run(self, run: StageRun) -> dict[str, Any]:
        """Make the result, on every rank.

        Returns:
            Entries of `stage.json` of this kind.
        """

        def make() -> dict[str, Any]:
            run.begin()
            started = time.perf_counter()
            found = self.make(run)
            seconds = round(time.perf_counter() - started, 1)
            return {"models": self.models, **found, "seconds": seconds}

        return broadcast_from_main(make)

    def make(self, run: StageRun) -> dict[str, Any]:
        """Make the result, on the main process alone.

        Returns:
            For `stage.json`: `parameters` of a model, or `conversations` of data, and more.
        """
        raise NotImplementedError

    def plan(self, recipe: Recipe, name: str, machine: Any, sizes: Mapping[str, Any]) -> Any:
        """Plan its memory and time on a machine: by default, the weights that it holds."""
        from dominie.planning.plan import plan_untrained

        del sizes
        return plan_untrained(recipe, name, self, machine)

    def describe(self, record: Mapping[str, Any]) -> str:
        """Describe a finished stage in one line, for the terminal, `stage.json` and the report."""
        models = " and ".join(record.get("models", ()))
        parts = [f"{self.kind} of {models}" if models else self.kind]
        parts.append(f"{record['seconds']:.0f} s")
        if "parameters" in record:
            parts.append(f"{record['parameters'] / 1e6:.2f}M parameters")
        if "conversations" in record:
            parts.append(f"{record['conversations']:,} conversations")
        return ", ".join(parts)


class WeightsKind(StageKind):
    """A kind that makes a model of the weights of others, which are alike; nothing is trained."""

    def prepare(self, name: str, preparation: Preparation) -> Prepared:
        """Check that the models have one tokenizer and one shape; find the fingerprint."""
        from dominie.models.matching import check_one_tokenizer
        from dominie.stages.fingerprint import digest, making_dependencies, making_parts
        from dominie.stages.prepare import check_alike

        tokenizer = preparation.tokenizers.of(name)
        for other in self.models[1:]:
            where = f"stages.{name}, model {other}"
            check_one_tokenizer(tokenizer, preparation.tokenizers.of(other), where=where)
        check_alike(preparation.folder, self.models, where=f"stages.{name}.{self.key}")
        self.check_models(name, preparation)
        sources = self.rows(name, preparation)
        read = ", ".join(rows.train.digest for rows in sources.values()) or None
        parts = making_parts(preparation.recipe, name, preparation.fingerprints, read)
        depends = making_dependencies(*parts)
        return Prepared(name, self, tokenizer, digest(*parts), depends=depends, sources=sources)

    def check_models(self, name: str, preparation: Preparation) -> None:
        """Refuse models that this kind cannot read."""

    def rows(self, name: str, preparation: Preparation) -> dict[str, PreparedSource]:
        """Tokenise the sources that it reads, but for those that a stage makes and has not yet."""
        from dominie.models.matching import check_context, check_vocabulary

        if not self.named_sources:
            return {}
        model, length = preparation.folder.info(name), preparation.recipe.train.max_length
        rows = preparation.rows(name, length)
        found = {}
        for key, source in self.named_sources.items():
            where = f"stages.{name}.{key}"
            check_context(model, length, where=where)
            if source in rows:
                check_vocabulary(model, rows[source].train.highest_id, where=where)
                found[source] = rows[source]
        return found

    def make(self, run: StageRun) -> dict[str, Any]:
        """Write weights, configuration and tokenizer of the model."""
        models = {name: run.folder.model(name) for name in self.models}
        return {"parameters": export(run, lambda to: self.write(models, to, run.prepared))}

    def write(self, models: Mapping[str, Model], folder: Path, prepared: Prepared) -> int:
        """Write the weights and the configuration; return the number of parameters."""
        raise NotImplementedError


def export(run: StageRun, write: Callable[[Path], int]) -> int:
    """Write a model of other models' weights, with its tokenizer; it appears as a whole.

    Args:
        run: of the stage.
        write: writes weights and configuration to a folder, and counts the parameters.

    Returns:
        The number of parameters.
    """
    from dominie.models.weights import prepare_export

    with run.result() as folder:
        parameters = write(folder)
        run.prepared.tokenizer.save_pretrained(folder)
        prepare_export(folder, run.prepared.tokenizer)
    return parameters


def stage_kind(recipe: Recipe, name: str) -> StageKind:
    """Get a stage of a recipe with the methods of its kind."""
    return cast("StageKind", recipe.stages[name])


def pair_rows(
    preparation: Preparation, name: str, stage: TrainStage, known: Container[str]
) -> tuple[dict[str, PairedRows], dict[str, str]]:
    """Pair the sources of a stage with the tokens of the teachers that it compares with by spans.

    Returns:
        The pairs by teacher, and of each source that is known what its pairs depend on.

    Raises:
        InputError: nothing of a source can be paired, or the teacher's tokens are reordered.
    """
    from dominie.teachers.paired_rows import pair_sources

    folder, found, keys = preparation.folder, {}, {}
    for teacher, sources in span_sources(stage).items():
        if folder.spec(teacher).map_tokens:
            raise InputError(
                "spans compares with a teacher in its own tokens, which map_tokens would reorder",
                where=f"models.{teacher}.map_tokens",
                do="remove map_tokens, or use prediction in place of spans",
            )
        with preparation.display.progress(f"conversations for {teacher}") as advance:
            found[teacher], alignments = pair_sources(
                [folder.source(source) for source in sources if source in known],
                preparation.tokenizers.of(name),
                preparation.tokenizers.of(teacher),
                max_length=stage.train.max_length,
                teacher_length=folder.info(teacher).context,
                cache=folder.rows,
                progress=lambda source, read: advance(read, None, source),
            )
        for source, (path, alignment) in alignments.items():
            line = alignment.line(source, teacher)
            if not alignment.direct + alignment.chunks:
                raise InputError(
                    "nothing that the student learns can be compared with this teacher",
                    where=f"stages.{name}.data.{source}",
                    expected="answers with the same text under both chat templates",
                    found=line,
                    do="compare the two renderings (dominie.data.supervised_spans)",
                )
            preparation.notice(f"{name}: {line}")
            keys[source] = path.name
    return found, keys
