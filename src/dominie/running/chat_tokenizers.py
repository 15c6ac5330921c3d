"""The tokenizer of every model of a run, each with a chat template, a borrowed one if need be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dominie.data.tokenizers import tokenizer_fingerprint
from dominie.display import Display
from dominie.errors import InputError
from dominie.models.agreement import differing_ids
from dominie.models.loading import load_tokenizer
from dominie.running.folder import RunFolder


class ChatTokenizers:
    """Tokenizers by model name; stages have that of the model their chain of students began with.

    A base model has no chat template. It is given the one its recipe names (`chat_template`), or
    else that of the first model of the recipe with the same tokens, which is said once.

    Args:
        folder: of the run.
        display: where a borrowed template is mentioned.
    """

    def __init__(self, folder: RunFolder, display: Display) -> None:
        self.folder, self.display = folder, display
        self._loaded: dict[str, Any] = {}
        self._complete: dict[str, Any] = {}
        self._fingerprints: dict[str, str] = {}

    def of(self, name: str) -> Any:
        """The tokenizer of a stage or model.

        Raises:
            InputError: it cannot be loaded, or no template can be found for it.
        """
        root = self.folder.root(name)
        if root not in self._complete:
            self._complete[root] = self._with_template(root)
        return self._complete[root]

    def fingerprint(self, name: str) -> str:
        """Equal for tokenizers of the same tokens and the same template."""
        root = self.folder.root(name)
        if root not in self._fingerprints:
            self._fingerprints[root] = tokenizer_fingerprint(self.of(root))
        return self._fingerprints[root]

    def _own(self, root: str) -> Any:
        if root not in self._loaded:
            self._loaded[root] = load_tokenizer(self.folder.model(root))
        return self._loaded[root]

    def _with_template(self, root: str) -> Any:
        tokenizer = self._own(root)
        given = self.folder.model(root).chat_template
        if given is not None:
            tokenizer.chat_template = _template_text(given)
        elif tokenizer.chat_template is None:
            tokenizer.chat_template = self._borrowed(root)
        return tokenizer

    def _borrowed(self, root: str) -> Any:
        recipe = self.folder.recipe
        named = [model for stage in recipe.stages.values() for model in stage.models]
        for other in dict.fromkeys(self.folder.root(name) for name in named):
            lender = self._own(other)
            if lender.chat_template is not None and not differing_ids(self._own(root), lender):
                self.display.line(f"{root} has no chat template; it is given that of {other}")
                return lender.chat_template
        raise InputError(
            "the tokenizer has no chat template, and no model of the recipe has one to lend",
            where=root,
            expected="a template that says how a conversation becomes text",
            do=f"set models: {{NAME: {{path: {root}, chat_template: FILE.jinja}}}}",
        )


def _template_text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError("the chat template cannot be read", where=path, found=str(error)) from None
