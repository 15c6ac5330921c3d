"""What makes two tokenizers the same."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of all that decides the ids of a conversation, wherever the tokenizer was loaded from.

    That is its ids, its merges, normaliser and pre-tokeniser, its added and special tokens, and its
    chat template. Padding and truncation are not part of it: they change with every call, and the
    token that pads is chosen by whoever trains.
    """
    backend: dict[str, Any] = {}
    if getattr(tokenizer, "is_fast", False):
        backend = json.loads(tokenizer.backend_tokenizer.to_str())
        backend.pop("padding", None)
        backend.pop("truncation", None)
    identity = {
        "ids": sorted(tokenizer.get_vocab().items()),
        "added": {
            str(number): token.__getstate__()
            for number, token in tokenizer.added_tokens_decoder.items()
        },
        "special": {
            name: token
            for name, token in tokenizer.special_tokens_map.items()
            if name != "pad_token"
        },
        "template": tokenizer.chat_template,
        "backend": backend,
    }
    text = json.dumps(identity, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()
