"""Everything that can be known before a stage is trained: its rows, its tokens, its fingerprint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dominie.chat_tokenizers import ChatTokenizers
from dominie.data.rows import PreparedSource, prepare
from dominie.display import Display
from dominie.fingerprints import model_fingerprint, stage_fingerprint
from dominie.models.agreement import check_same_tokens
from dominie.recipe import Stage
from dominie.recipe.check import stage_order
from dominie.run_folder import RunFolder


@dataclass(frozen=True)
class Prepared:
    """A stage whose data are ready and whose models are known to fit, before any is loaded.

    Attributes:
        name: of the stage.
        stage: its part of the recipe.
        tokenizer: the student's, with a chat template.
        sources: the sources it learns from, then those it only watches.
        fingerprint: of everything its model depends on.
    """

    name: str
    stage: Stage
    tokenizer: Any
    sources: Mapping[str, PreparedSource]
    fingerprint: str


def prepare_stages(folder: RunFolder, display: Display) -> list[Prepared]:
    """Read and tokenise all data and compare all tokenizers, before any stage is trained.

    Returns:
        The stages, each after those it learns from.

    Raises:
        InputError: data, templates, tokenizers or models that cannot be used.
    """
    recipe = folder.recipe
    tokenizers = ChatTokenizers(folder, display)
    rows_of = _RowsByTokens(folder, display)
    fingerprints: dict[str, str] = {}
    prepared = []
    for name in stage_order(recipe, where=recipe.name):
        stage, tokenizer = recipe.stages[name], tokenizers.of(name)
        for teacher in stage.models[1:]:
            check_same_tokens(
                tokenizer, tokenizers.of(teacher), where=f"stages.{name}, teacher {teacher}"
            )
        for model in stage.models:
            if model not in recipe.stages:
                fingerprints.setdefault(model, model_fingerprint(folder.model(model)))
        made = rows_of(tokenizer, tokenizers.fingerprint(name), stage.train.max_length)
        sources = {s: made[s] for s in [*stage.active, *(s for s in made if s not in stage.active)]}
        fingerprints[name] = stage_fingerprint(
            recipe,
            name,
            rows={source: made[source].train.digest for source in stage.active},
            models=fingerprints,
        )
        prepared.append(Prepared(name, stage, tokenizer, sources, fingerprints[name]))
    return prepared


class _RowsByTokens:
    """Tokenised sources for each tokenizer and length, made once and told about once."""

    def __init__(self, folder: RunFolder, display: Display) -> None:
        self.folder, self.display = folder, display
        self._made: dict[tuple[str, int], dict[str, PreparedSource]] = {}

    def __call__(
        self, tokenizer: Any, fingerprint: str, max_length: int
    ) -> dict[str, PreparedSource]:
        key = (fingerprint, max_length)
        if key not in self._made:
            self._made[key] = self._prepared(tokenizer, max_length)
        return self._made[key]

    def _prepared(self, tokenizer: Any, max_length: int) -> dict[str, PreparedSource]:
        sources = {name: self.folder.source(name) for name in self.folder.recipe.data}
        with self.display.progress("conversations") as advance:
            made = prepare(
                sources,
                tokenizer,
                max_length=max_length,
                cache=self.folder.rows,
                progress=lambda name, read: advance(read, None, name),
            )
        for name, source in made.items():
            self.display.line(source.summary.line(name))
        return made
