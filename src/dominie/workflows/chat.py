"""`dominie chat`: one or several models of runs, side by side."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dominie.core.display import Display
from dominie.core.errors import InputError, RunError, nearest
from dominie.core.run_reader import is_run, no_such_run, read_object
from dominie.data.formats import Message
from dominie.generation.generator import Generation, GenerationRequest, Generator, Sampling
from dominie.generation.local import LocalGenerator
from dominie.models.loading import load_frozen, load_tokenizer
from dominie.models.model_folder import is_model
from dominie.models.spec import Model
from dominie.recipe import Recipe, load_recipe
from dominie.stages.run_folder import ChatTokenizers, RunFolder, check_whole
from dominie.workflows.chat_screens import OnPiece, Screen


@dataclass(frozen=True)
class ChatModel:
    """A model to chat with: its name on the screen and its generator."""

    name: str
    generator: Generator


@dataclass(frozen=True)
class _Named:
    """A model that was asked for: its run, its name, its spec and the run's folder."""

    run: str
    name: str
    spec: Model
    folder: RunFolder | None = None


def chat_models(wanted: Sequence[str], runs: Path, display: Display) -> list[ChatModel]:
    """Load the models of these names.

    Args:
        wanted: `RUN`, `RUN:NAME` or `RUN:NAME,NAME`: a run's folder, or its name in `runs`; a
            stage, or a name under `evaluate.models` or `models`. Without a name, the last stage.
            The folder of a model works, too.
        runs: the folder of all runs.
        display: shows what is loaded.

    Raises:
        InputError: no such run, no such model in it, or a stage that has not been trained.
    """
    named = [model for name in wanted for model in _named(name, runs)]
    several_runs = len({each.run for each in named}) > 1
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = []
    for each in dict.fromkeys(named):
        name = f"{each.run}:{each.name}" if several_runs else each.name
        display.line(f"loading {name} from {each.spec.path}")
        if each.folder is not None:
            stage = each.folder.stage(_model_name(each.folder.recipe, each.name))
            check_whole(stage, read_object(stage / "stage.json"), display)
        model = load_frozen(each.spec, device=device)
        found.append(chat_model(name, model, _tokenizer(each, display)))
    return found


def chat_model(name: str, model: Any, tokenizer: Any) -> ChatModel:
    """Return a loaded model, in evaluation mode, to chat with."""
    return ChatModel(name, LocalGenerator(lambda: (model, tokenizer)))


def _tokenizer(named: _Named, display: Display) -> Any:
    """Return the tokenizer that a stage wrote; else one with a chat template, as in the run."""
    if named.folder is None or named.name in named.folder.recipe.stages:
        return load_tokenizer(named.spec)
    return ChatTokenizers(named.folder, display).of(_model_name(named.folder.recipe, named.name))


def _named(wanted: str, runs: Path) -> list[_Named]:
    place, names = Path(wanted), ""
    if not place.is_dir() and ":" in wanted:
        head, _, names = wanted.rpartition(":")
        place = Path(head)
    folders = [path for path in (place, runs / place) if path.is_dir()]
    path = next((p for p in folders if is_model(p) or _is_run(p)), next(iter(folders), None))
    if path is None:
        raise no_such_run(wanted, place, runs)
    if is_model(path) and not names:
        whole = path.resolve()
        name = whole.parent.name if whole.name == "model" else whole.name
        return [_Named(str(path), name, Model(path=str(path)))]
    if not _is_run(path):
        recipe_here = (path / "recipe.yaml").is_file()
        raise InputError(
            "this is not a run's folder",
            where=str(path),
            expected="what `dominie run` writes: recipe.yaml and a folder for each stage",
            do=f"`dominie run {path}` makes one of its recipe"
            if recipe_here
            else "name a folder in runs/, or the model/ folder of a stage",
        )
    recipe = dataclasses.replace(load_recipe(path / "recipe.yaml"), name=path.resolve().name)
    folder = RunFolder(recipe, path.resolve().parent)
    models = _models_made(recipe) or [
        *(recipe.evaluate.models if recipe.evaluate else recipe.models)
    ]
    chosen = [name.strip() for name in names.split(",") if name.strip()] or [models[-1]]
    return [_Named(recipe.name, name, _spec(folder, name), folder) for name in chosen]


def _is_run(path: Path) -> bool:
    """Return whether a folder is a run's; that of a recipe has no stages in it."""
    return (path / "recipe.yaml").is_file() and is_run(path)


def _models_made(recipe: Recipe) -> list[str]:
    """Return the stages that make a model."""
    return [name for name in recipe.stages if name not in recipe.made]


def _model_name(recipe: Recipe, name: str) -> str:
    """Return the model of a name under `evaluate.models`; a stage's name comes first."""
    if name in recipe.stages or recipe.evaluate is None:
        return name
    model: str = recipe.evaluate.models.get(name, name)
    return model


def _spec(folder: RunFolder, name: str) -> Model:
    recipe = folder.recipe
    known = [
        *_models_made(recipe),
        *(recipe.evaluate.models if recipe.evaluate else ()),
        *recipe.models,
    ]
    if name not in known:
        near = nearest(name, known)
        raise InputError(
            f"the run has no model {name!r}",
            where=str(folder.path),
            expected=", ".join(dict.fromkeys(known)),
            do=f"did you mean {folder.path}:{near}?" if near else None,
        )
    model = _model_name(recipe, name)
    spec = folder.model(model)
    if model in recipe.stages and not is_model(Path(spec.path)):
        raise InputError(
            f"stage {model} has not been trained",
            where=spec.path,
            do="run `dominie run` on its recipe first",
        )
    return spec


HELP = (
    "/reset  forget the conversation   /quit  leave (so does the end of input)   /help  this   "
    "Ctrl-C  cut an answer short"
)


def chat(
    models: Sequence[ChatModel],
    lines: Iterable[str],
    screen: Screen,
    sampling: Sampling,
    system: str = "",
) -> None:
    """Answer every line until the input ends, or until `/quit`.

    Each model remembers the messages, the system message first, and its own answers.

    Raises:
        InputError: a chat template that refuses the conversation.
    """
    sessions = [ChatSession(model, sampling, system) for model in models]
    for line in lines:
        text = line.strip()
        if not text:
            continue
        if text == "/quit":
            return
        if text == "/reset":
            for session in sessions:
                session.reset()
            screen.line("forgotten")
        elif text.startswith("/") and len(text.split()) == 1:
            screen.line(HELP if text == "/help" else f"no such command: {text}   {HELP}")
        else:
            _answer(sessions, text, screen)


def _answer(sessions: Sequence[ChatSession], text: str, screen: Screen) -> None:
    full = []
    with screen.answers([session.model.name for session in sessions]) as show:
        for session, on_piece in zip(sessions, show, strict=True):
            if not session.answer(text, on_piece):
                full.append(session.model.name)
    for name in full:
        screen.line(f"the conversation fills the whole context of {name}; /reset begins anew")


class ChatSession:
    """The conversation with one model; an empty system message is none."""

    def __init__(self, model: ChatModel, sampling: Sampling, system: str = "") -> None:
        self.model, self._sampling, self._system = model, sampling, system
        self.messages: list[Message] = []
        self.reset()

    def reset(self) -> None:
        """Forget the conversation."""
        self.messages = [{"role": "system", "content": self._system}] if self._system else []

    def answer(self, text: str, on_piece: OnPiece) -> bool:
        """Answer a message, piece by piece.

        Returns:
            Whether there was room for an answer; if not, the message is not remembered.
        """
        messages: list[Message] = [*self.messages, {"role": "user", "content": text}]
        pieces: list[str] = []
        results: list[Generation] = []

        def on_text(_: int, piece: str) -> None:
            piece = piece if pieces else piece.lstrip()
            if piece:
                pieces.append(piece)
                on_piece(piece)

        request = GenerationRequest(messages=messages, sampling=self._sampling)
        with contextlib.suppress(KeyboardInterrupt):  # cut short, but kept
            self.model.generator.generate(
                [request], lambda _, result: results.append(result), on_text=on_text
            )
        if any(result.token_ids == [] for result in results):
            return False
        if unanswered := [r.reason for r in results if r.stop_reason == "unanswered"]:
            raise RunError(
                "the endpoint does not answer",
                where=self.model.name,
                found=unanswered[0],
                do="ask again, or something else if it was refused",
            )
        if not pieces:
            on_piece("(nothing)")
        # The same question is sampled anew.
        self._sampling = dataclasses.replace(self._sampling, seed=self._sampling.seed + 1)
        self.messages = [*messages, {"role": "assistant", "content": "".join(pieces).strip()}]
        return True
