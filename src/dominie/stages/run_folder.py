"""The folder of a run: paths, and the models, sources and tokenizers of a recipe's names."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dominie.core.display import Display
from dominie.core.distributed import is_main_process
from dominie.core.errors import InputError
from dominie.core.io import exclusive_lock, manifest_error, remove, write_checksummed
from dominie.core.run_reader import read_stage
from dominie.data.sources import Source
from dominie.data.tokenization import tokenizer_fingerprint
from dominie.models.gguf_header import is_gguf
from dominie.models.gguf_model import dequantised
from dominie.models.info import ModelInfo, describe
from dominie.models.matching import differing_ids
from dominie.models.spec import Model
from dominie.recipe import Recipe
from dominie.toyworld import is_toyworld, materialise

#: Where files and folders are written before they get their names.
_HALF_MADE = (
    "rows/.making-*",
    "toyworld/.toyworld-*",
    "gguf/.making-*",
    ".report-*",
    ".taking-*",
    "*/.writing-model",
    "*/.writing-data",
)


class RunFolder:
    """`runs/<name>`, and the models and sources that the recipe's names refer to."""

    def __init__(self, recipe: Recipe, runs: Path, described: Recipe | None = None) -> None:
        self.recipe, self.path = recipe, runs / recipe.name
        #: What the folder holds when this recipe has run: more, if it is a part of another.
        self.described = described or recipe
        self._info: dict[str, ModelInfo] = {}

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Create the folder and lock it, so that no two runs write it at once.

        Raises:
            InputError: it cannot be written, or another process holds it.
        """
        with contextlib.ExitStack() as stack:
            try:
                self.path.mkdir(parents=True, exist_ok=True)
                if is_main_process():  # the ranks of one run share its folder
                    stack.enter_context(exclusive_lock(self.path / ".lock"))
                    self._remove_half_made()
            except OSError as error:
                raise InputError(
                    "the run's folder cannot be written",
                    where=str(self.path),
                    found=error.strerror,
                    do="choose another place with --runs DIR",
                ) from None
            yield

    def _remove_half_made(self) -> None:
        """Remove what a run that was killed has left half written."""
        for pattern in _HALF_MADE:
            for path in self.path.glob(pattern):
                remove(path)

    def check_overwrites(self) -> None:
        """Refuse to begin from a model that this run would overwrite.

        Raises:
            InputError: a student or teacher is in the folder of one of the stages.
        """
        places = {name: self.stage(name).resolve() for name in self.recipe.stages}
        for name, stage in self.recipe.stages.items():
            for model in set(stage.models) - {*self.recipe.stages, *self.recipe.served}:
                path = Path(self.recipe.model(model).path).resolve()
                owner = next((n for n, place in places.items() if place in path.parents), None)
                if owner is not None:
                    raise InputError(
                        "this run would overwrite a model that it reads",
                        where=f"stages.{name}: {model}",
                        found=f"the model of stage {owner} of the run {self.recipe.name}",
                        do=f"give the run another name, as in name={self.recipe.name}-2",
                    )

    @property
    def rows(self) -> Path:
        """The folder of tokenised conversations."""
        return self.path / "rows"

    def replies(self, benchmark: str) -> Path:
        """The file with every reply of a benchmark's judge."""
        return self.path / "evaluation" / f"{benchmark}.replies.jsonl"

    def stage(self, name: str) -> Path:
        """The folder of a stage."""
        return self.path / name

    def source(self, name: str) -> Source:
        """Locate a source: of the recipe, its toy data generated, or of a stage that makes data."""
        source = self.recipe.sources[name]
        of_stage = name not in self.recipe.data
        path = str(self.path / source.path) if of_stage else self._generated(source.path)
        return dataclasses.replace(source, path=path)

    def model(self, name: str) -> Model:
        """Locate the model that a name refers to, as a folder or hub id to load weights from.

        A GGUF file is dequantised into the run's folder when it is first asked for.
        """
        spec = self.spec(name)
        if not is_gguf(spec.path):
            return spec
        return dataclasses.replace(spec, path=str(dequantised(spec, self.path / "gguf")))

    def spec(self, name: str) -> Model:
        """Locate the model that a name refers to; what is known without its weights follows."""
        if name in self.recipe.stages:
            return Model(path=str(self.stage(name) / "model"))
        spec = self.recipe.model(name)
        return dataclasses.replace(spec, path=self._generated(spec.path))

    def info(self, name: str) -> ModelInfo:
        """Describe a model, or what a stage will make, before it is made.

        Raises:
            InputError: its configuration cannot be read.
        """
        if name not in self._info:
            stage, served = self.recipe.stages.get(name), self.recipe.served.get(name)
            if served is not None:
                tokens = served.tokenizer and Model(
                    path=self._generated(served.tokenizer), chat_template=served.chat_template
                )
                self._info[name] = ModelInfo(
                    name=name, origin="server", tokenizer_spec=tokens or None, base=served.model
                )
            elif stage is not None:
                self._info[name] = stage.model_info(name, self.info)
            else:
                self._info[name] = describe(self.spec(name), name=name)
        return self._info[name]

    def teacher(self, name: str) -> Model:
        """Locate a teacher, with the placement that the recipe gives it."""
        placement = self.recipe.placement(name)
        return dataclasses.replace(self.model(name), placement=placement)

    def root(self, name: str) -> str:
        """Follow a chain of stages to the model it starts from, whose tokenizer they share."""
        while name in self.recipe.stages:
            name = self.recipe.stages[name].models[0]
        return name

    def _generated(self, path: str) -> str:
        if not is_toyworld(path):
            return path
        return str(materialise(path, self.path / "toyworld", seed=self.recipe.train.seed))

    def trained_fingerprints(self) -> dict[str, str]:
        """Read the fingerprint of every finished stage from its `stage.json`."""
        records = {name: read_stage(self.stage(name)) for name in self.recipe.stages}
        return {name: r["fingerprint"] for name, r in records.items() if r.get("status") == "done"}


def write_stage(path: Path, record: Mapping[str, Any]) -> None:
    """Replace `stage.json` in one step."""
    write_checksummed(path / "stage.json", record)


def check_whole(path: Path, record: Mapping[str, Any], display: Display) -> None:
    """Refuse a model or data whose files have changed; warn of changed metrics.

    Raises:
        InputError: names the file.
    """
    files = dict(record.get("files", {}))
    metrics = {name: files.pop(name) for name in ("metrics.jsonl",) if name in files}
    kind = "data" if any(name.startswith("data/") for name in files) else "model"
    if (found := manifest_error(path, files)) is not None:
        raise InputError(
            f"the {kind} of a finished stage {'are' if kind == 'data' else 'is'} damaged",
            where=str(path),
            found=found,
            do=f"put back a copy of the file; or move {path} away, and the stage is trained again",
        )
    if (found := manifest_error(path, metrics)) is not None:
        display.line(f"{path}/{found}; the report shows what can be read of it")


def set_aside(path: Path) -> Path:
    """Move the folder of a stage to `.replaced/`, so that a changed recipe deletes nothing."""
    name = f"{path.name}-{read_stage(path).get('fingerprint', 'unknown')}"
    kept = path.parent / ".replaced" / name
    number = 1
    while kept.exists():
        number += 1
        kept = kept.with_name(f"{name}-{number}")
    kept.parent.mkdir(exist_ok=True)
    path.rename(kept)
    return kept


class ChatTokenizers:
    """Tokenizers by model name; stages have that of the model their chain of students began with.

    A base model has no chat template. It is given the one its recipe names (`chat_template`), or
    else that of the first model of the recipe with the same tokens, with a notice.
    """

    def __init__(self, folder: RunFolder, display: Display) -> None:
        self.folder, self.display = folder, display
        self._loaded: dict[str, Any] = {}
        self._complete: dict[str, Any] = {}
        self._fingerprints: dict[str, str] = {}

    def of(self, name: str) -> Any:
        """Load the tokenizer of a stage or model.

        Raises:
            InputError: it cannot be loaded, or no template can be found for it.
        """
        root = self.folder.root(name)
        if root not in self._complete:
            spec = self.folder.info(root).need("tokenizer_spec", use="tokenising")
            tokenizer, given = self._own(root), spec.chat_template
            if given is not None:
                tokenizer.chat_template = _template_text(given)
            elif tokenizer.chat_template is None:
                tokenizer.chat_template = self._shared_template(root)
            self._complete[root] = tokenizer
        return self._complete[root]

    def fingerprint(self, name: str) -> str:
        """Hash the tokens and the template of a tokenizer."""
        root = self.folder.root(name)
        if root not in self._fingerprints:
            self._fingerprints[root] = tokenizer_fingerprint(self.of(root))
        return self._fingerprints[root]

    def _own(self, root: str) -> Any:
        if root not in self._loaded:
            self._loaded[root] = self.folder.info(root).tokenizer()
        return self._loaded[root]

    def _shared_template(self, root: str) -> Any:
        recipe = self.folder.recipe
        named = [model for stage in recipe.stages.values() for model in stage.models]
        for other in dict.fromkeys(self.folder.root(name) for name in named):
            if self.folder.info(other).tokenizer_spec is None:  # a server that writes answers
                continue
            lender = self._own(other)
            if lender.chat_template is not None and not differing_ids(self._own(root), lender):
                self.display.line(f"{root} has no chat template; it is given that of {other}")
                return lender.chat_template
        raise InputError(
            "the tokenizer has no chat template, and no model of the recipe has one to lend",
            where=root,
            expected="a template that turns a conversation into text",
            do=f"set models: {{NAME: {{path: {root}, chat_template: FILE.jinja}}}}",
        )


def _template_text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError("the chat template cannot be read", where=path, found=str(error)) from None
