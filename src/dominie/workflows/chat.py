"""`dominie chat`: one or several models of runs, side by side."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import TextStreamer

from dominie.core.display import Display
from dominie.core.errors import InputError
from dominie.core.run_reader import is_run, no_such_run
from dominie.data.tokenization import ends_of_turn, prompt_ids
from dominie.generation.generator import configured_stops
from dominie.models.head import text_config
from dominie.models.info import info_of
from dominie.models.loading import load_frozen, load_tokenizer
from dominie.models.spec import Model, is_model
from dominie.recipe import Recipe, load_recipe
from dominie.stages.run_folder import ChatTokenizers, RunFolder
from dominie.workflows.chat_screens import Say, Screen

if TYPE_CHECKING:
    from dominie.data.formats import Message


@dataclass(frozen=True)
class Partner:
    """A model in evaluation mode, with its tokenizer."""

    name: str
    model: Any
    tokenizer: Any


@dataclass(frozen=True)
class _Named:
    """A model that was asked for: where it is from, and how its tokenizer is had."""

    run: str
    name: str
    spec: Model
    folder: RunFolder | None = None


def partners(wanted: Sequence[str], runs: Path, display: Display) -> list[Partner]:
    """Load the models that these words name.

    Args:
        wanted: `RUN`, `RUN:NAME` or `RUN:NAME,NAME`: a run's folder, or its name in `runs`; a
            stage, or a name under `evaluate.models` or `models`. Without a name the last stage.
            The folder of a model serves, too.
        runs: the folder of all runs.
        display: says what is loaded.

    Raises:
        InputError: no such run, no such model in it, or a stage that has not been trained.
    """
    named = [model for word in wanted for model in _named(word, runs)]
    several_runs = len({each.run for each in named}) > 1
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = []
    for each in dict.fromkeys(named):
        name = f"{each.run}:{each.name}" if several_runs else each.name
        display.line(f"loading {name} from {each.spec.path}")
        found.append(
            Partner(name, load_frozen(each.spec, device=device), _tokenizer(each, display))
        )
    return found


def _tokenizer(named: _Named, display: Display) -> Any:
    """The tokenizer a stage wrote beside its weights; else one with a template as in the run."""
    if named.folder is None or named.name in named.folder.recipe.stages:
        return load_tokenizer(named.spec)
    return ChatTokenizers(named.folder, display).of(_model_name(named.folder.recipe, named.name))


def _named(word: str, runs: Path) -> list[_Named]:
    place, names = Path(word), ""
    if not place.is_dir() and ":" in word:
        head, _, names = word.rpartition(":")
        place = Path(head)
    there = [path for path in (place, runs / place) if path.is_dir()]
    path = next((p for p in there if is_model(p) or _is_run(p)), there[0] if there else None)
    if path is None:
        raise no_such_run(word, place, runs)
    if is_model(path) and not names:
        home = path.resolve()
        name = home.parent.name if home.name == "model" else home.name
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
    chosen = [name.strip() for name in names.split(",") if name.strip()] or [_last(recipe)]
    return [_Named(recipe.name, name, _spec(folder, name), folder) for name in chosen]


def _is_run(path: Path) -> bool:
    """Whether a folder is a run's; that of a recipe has no stages in it."""
    return (path / "recipe.yaml").is_file() and is_run(path)


def _last(recipe: Recipe) -> str:
    """Whom a run is about, where nobody is named: what its last stage made."""
    if recipe.stages:
        return list(recipe.stages)[-1]
    return list(recipe.evaluate.models if recipe.evaluate else recipe.models)[-1]


def _model_name(recipe: Recipe, name: str) -> str:
    """What a name of `evaluate.models` stands for; a stage's comes first."""
    if name in recipe.stages or recipe.evaluate is None:
        return name
    meant: str = recipe.evaluate.models.get(name, name)
    return meant


def _spec(folder: RunFolder, name: str) -> Model:
    recipe = folder.recipe
    known = [*recipe.stages, *(recipe.evaluate.models if recipe.evaluate else ()), *recipe.models]
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        raise InputError(
            f"the run has no model {name!r}",
            where=str(folder.path),
            expected=", ".join(dict.fromkeys(known)),
            do=f"did you mean {folder.path}:{near[0]}?" if near else None,
        )
    meant = _model_name(recipe, name)
    spec = folder.model(meant)
    if meant in recipe.stages and not is_model(Path(spec.path)):
        raise InputError(
            f"stage {meant} has not been trained",
            where=spec.path,
            do="run `dominie run` on its recipe first",
        )
    return spec


HELP = (
    "/reset  forget what was said   /quit  leave (so does the end of input)   /help  this   "
    "Ctrl-C  cut an answer short"
)


@dataclass(frozen=True)
class Settings:
    """How answers are generated.

    Attributes:
        max_new_tokens: of the longest answer.
        temperature: of sampling; 0 takes the most probable token.
        system: a system message, none where it is empty.
        seed: of sampling.
    """

    max_new_tokens: int = 512
    temperature: float = 0.0
    system: str = ""
    seed: int = 0


def chat(
    speakers: Sequence[Partner], lines: Iterable[str], screen: Screen, settings: Settings
) -> None:
    """Answer every line until there is none, or until `/quit`.

    Each model remembers what was said to it and what it answered itself.

    Raises:
        InputError: a chat template that refuses the conversation.
    """
    torch.manual_seed(settings.seed)
    talks = [Talk(partner, settings) for partner in speakers]
    for line in lines:
        text = line.strip()
        if not text:
            continue
        if text == "/quit":
            return
        if text == "/reset":
            for talk in talks:
                talk.reset()
            screen.line("forgotten")
        elif text.startswith("/") and len(text.split()) == 1:
            screen.line(HELP if text == "/help" else f"no such command: {text}   {HELP}")
        else:
            _answer(talks, text, screen)


def _answer(talks: Sequence[Talk], text: str, screen: Screen) -> None:
    full = []
    with screen.answers([talk.partner.name for talk in talks]) as says:
        for talk, say in zip(talks, says, strict=True):
            if not talk.answer(text, say):
                full.append(talk.partner.name)
    for name in full:
        screen.line(f"the conversation fills the whole context of {name}; /reset begins anew")


class Talk:
    """What one model was told and has answered."""

    def __init__(self, partner: Partner, settings: Settings) -> None:
        self.partner, self.settings = partner, settings
        self._stops = sorted(set(ends_of_turn(partner.tokenizer)) | configured_stops(partner.model))
        self.messages: list[Message] = []
        self.reset()

    def reset(self) -> None:
        """Begin anew."""
        system = self.settings.system
        self.messages = [{"role": "system", "content": system}] if system else []

    def answer(self, text: str, say: Say) -> bool:
        """Answer a message, piece by piece.

        Returns:
            Whether there was room for an answer; else the message is as if it had not been said.
        """
        model, tokenizer = self.partner.model, self.partner.tokenizer
        padding = tokenizer.pad_token_id  # named, since `generate` would warn where it is not
        asked: list[Message] = [*self.messages, {"role": "user", "content": text}]
        prompt = prompt_ids(tokenizer, asked)
        context = info_of(text_config(model)).context or 2**31
        room = min(self.settings.max_new_tokens, context - len(prompt))
        if room < 1:
            return False
        said: list[str] = []

        def heard(piece: str) -> None:
            piece = piece if said else piece.lstrip()
            if piece:
                said.append(piece)
                say(piece)

        sampled = self.settings.temperature > 0
        with torch.no_grad(), contextlib.suppress(KeyboardInterrupt):  # cut short, not thrown away
            model.generate(
                input_ids=torch.tensor([prompt], device=model.device),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.long, device=model.device),
                max_new_tokens=room,
                do_sample=sampled,
                temperature=self.settings.temperature if sampled else None,
                top_p=None,
                top_k=None,
                eos_token_id=self._stops or None,
                pad_token_id=0 if padding is None else padding,
                streamer=_Pieces(tokenizer, heard),
            )
        if not said:
            say("(nothing)")
        self.messages = [*asked, {"role": "assistant", "content": "".join(said).strip()}]
        return True


class _Pieces(TextStreamer):
    """Hands on text as soon as it is known how its tokens are written."""

    def __init__(self, tokenizer: Any, heard: Say) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.heard = heard

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Called by `generate`."""
        self.heard(text)
