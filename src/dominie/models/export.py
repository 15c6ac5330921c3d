"""What a model's folder needs so that others run it as it was trained."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from transformers.utils import cached_file

from dominie.data.tokenization import ends_of_turn


def prepare_export(folder: Path, tokenizer: Any) -> None:
    """Have a saved model stop where its answers end, generate with a cache, and split texts alike.

    A base model ends texts, not turns: its own settings know nothing of the token that its chat
    template ends an answer with. transformers and vLLM stop at every token that
    `generation_config.json` names.

    Args:
        folder: of weights or of an adapter.
        tokenizer: with a chat template.
    """
    config = _read(folder / "config.json")
    if config:
        for part in (config, *(value for value in config.values() if isinstance(value, dict))):
            if part.get("use_cache") is False:  # training's, not the model's
                part["use_cache"] = True
        _write(folder / "config.json", config)
    settings = _read(folder / "generation_config.json")
    stops = settings.get("eos_token_id", config.get("eos_token_id"))
    if stops is None:
        stops = tokenizer.eos_token_id
    known = stops if isinstance(stops, list) else [] if stops is None else [stops]
    ends = list(dict.fromkeys([*known, *ends_of_turn(tokenizer)]))
    if ends:
        settings["eos_token_id"] = ends[0] if len(ends) == 1 else ends
    if settings.get("pad_token_id") is None and tokenizer.pad_token_id is not None:
        settings["pad_token_id"] = tokenizer.pad_token_id
    _write(folder / "generation_config.json", settings)
    if (pieces := _sentencepiece(tokenizer)) and not (folder / pieces.name).exists():
        shutil.copyfile(pieces, folder / pieces.name)


def _sentencepiece(tokenizer: Any) -> Path | None:
    """The SentencePiece model that a tokenizer was made of, where it lies beside it.

    transformers does without and saves none. llama.cpp merges by its scores, and splits words
    otherwise where a folder lacks it.
    """
    if not (home := getattr(tokenizer, "name_or_path", None)):
        return None
    try:
        found = cached_file(
            home, "tokenizer.model", revision=tokenizer.init_kwargs.get("_commit_hash")
        )
    except (OSError, ValueError):  # it has none, or the hub is out of reach
        return None
    return Path(found) if found else None


def _read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found


def _write(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
