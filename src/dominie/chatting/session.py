"""A conversation with one or several models at once: what is said, and what they answer."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import TextStreamer

from dominie.chatting.partners import Partner
from dominie.chatting.screens import Say, Screen
from dominie.data.templates import ends_of_turn, prompt_ids
from dominie.evaluation.generation import configured_stops
from dominie.models.head import text_config

if TYPE_CHECKING:
    from dominie.data.formats import Message

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
        context = getattr(text_config(model), "max_position_embeddings", None) or 2**31
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
