"""Prepares stages before they run: rows, tokenizers and fingerprints, and what must not fail later.

Data that a stage makes are tokenised when they exist. Until then the stages that read them, and
those after these, are checked without them, and have no fingerprint.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from dominie.core.display import Display
from dominie.core.run_reader import read_stage
from dominie.data.rows import PreparedSource, prepare
from dominie.data.sources import content_fingerprint
from dominie.recipe.validate import stage_order
from dominie.stages.compatibility import check_questions, check_tasks
from dominie.stages.fingerprint import digest
from dominie.stages.kind import Prepared, stage_kind
from dominie.stages.run_folder import ChatTokenizers, RunFolder, check_whole


def prepare_stages(folder: RunFolder, display: Display) -> list[Prepared]:
    """Read and tokenise all data and compare all tokenizers, before any stage is run.

    Returns:
        The stages, each after those it reads models or data of.

    Raises:
        InputError: data, templates, tokenizers or models that cannot be used.
    """
    return Preparation(folder, display).all()


class Preparation:
    """Prepares stages one after the other, each knowing the fingerprints of those before it.

    Args:
        folder: of the run.
        display: shows progress, and every notice once.

    Attributes:
        recipe: of the run.
        tokenizers: by the name of a model or stage.
        fingerprints: of models, and of the results of stages; empty if that is not known yet.
    """

    def __init__(self, folder: RunFolder, display: Display) -> None:
        self.folder, self.recipe, self.display = folder, folder.recipe, display
        self.tokenizers = ChatTokenizers(folder, display)
        self.fingerprints: dict[str, str] = {}
        self._waits: dict[str, tuple[str, ...]] = {}
        self._rows: dict[tuple[str, int, tuple[str, ...]], dict[str, PreparedSource]] = {}
        self._shown: set[str] = set()

    def all(self) -> list[Prepared]:
        """Every stage in the order in which they run, and the tasks of the evaluation."""
        stages = [self.stage(name) for name in stage_order(self.recipe, where=self.recipe.name)]
        check_tasks(self.folder, self.tokenizers, self._exists)
        return stages

    def stage(self, name: str) -> Prepared:
        """Prepare a stage; those that it reads models or data of come first."""
        stage = stage_kind(self.recipe, name)
        for model in stage.models:
            if model not in self.recipe.stages:
                identity = self.folder.info(model).identity()
                self.fingerprints.setdefault(model, digest(identity))
        missing = [source for source in stage.sources if not self._exists(source)]
        before = [each for model in stage.models for each in self._waits.get(model, ())]
        self._waits[name] = tuple(dict.fromkeys([*before, *missing]))
        prepared = stage.prepare(name, self)
        if self._waits[name]:
            prepared = dataclasses.replace(prepared, fingerprint="", waits_for=self._waits[name])
        self.fingerprints[name] = prepared.fingerprint
        return prepared

    def check_made(self, name: str) -> None:
        """Check the tasks that ask questions of data which a stage has just made."""
        if self.recipe.stages[name].makes == "data":
            check_questions(self.folder, name)

    def rows(self, name: str, max_length: int) -> dict[str, PreparedSource]:
        """Tokenise for a stage: the recipe's sources, and the data that were made before it.

        What one of them holds out, the stage trains on in none of the others. Data that do not
        exist yet are left out; stages that ran before them cannot have held out their prompts.
        """
        made = tuple(s for s in self.recipe.made if s in self._before(name) and self._exists(s))
        key = (self.tokenizers.fingerprint(name), max_length, made)
        if key not in self._rows:
            names = [*self.recipe.data, *made]
            self._rows[key] = self._tokenised(names, self.tokenizers.of(name), max_length)
        return self._rows[key]

    def content(self, source: str) -> str:
        """A hash of what a source holds; empty if it does not exist yet."""
        return content_fingerprint(self.folder.source(source)) if self._exists(source) else ""

    def notice(self, line: str) -> None:
        """Show a line, once however often a stage is prepared."""
        if line not in self._shown:
            self._shown.add(line)
            self.display.line(line)

    def _before(self, name: str) -> set[str]:
        """The stages that come before one, directly or by way of others."""
        found: set[str] = set()
        waiting = [name]
        while waiting:
            more = [n for n in self.recipe.needs(waiting.pop()) if n not in found]
            found.update(more)
            waiting += more
        return found

    def _exists(self, source: str) -> bool:
        """Whether a source can be read: data that a stage makes, if they are those it would make.

        Raises:
            InputError: they were made, and are damaged.
        """
        if source in self.recipe.data:
            return True
        path, fingerprint = self.folder.stage(source), self.fingerprints.get(source)
        record = read_stage(path) if fingerprint else {}
        same = record.get("fingerprint") == fingerprint and record.get("status") == "done"
        if not (fingerprint and same and (path / "data").is_dir()):
            return False
        check_whole(path, record, self.display)
        return True

    def _tokenised(
        self, names: list[str], tokenizer: Any, max_length: int
    ) -> dict[str, PreparedSource]:
        sources = {name: self.folder.source(name) for name in names}
        with self.display.progress("conversations") as advance:
            rows = prepare(
                sources,
                tokenizer,
                max_length=max_length,
                cache=self.folder.rows,
                progress=lambda name, read: advance(read, None, name),
            )
        for name, source in rows.items():
            self.notice(source.summary.line(name))
        return rows
