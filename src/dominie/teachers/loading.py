"""A model as a teacher: frozen, its head understood, speaking the student's token ids."""

from __future__ import annotations

from typing import Any

import torch

from dominie.models.head import check_head, text_config
from dominie.models.loading import load_frozen, load_tokenizer
from dominie.models.spec import Model
from dominie.models.token_map import adopt_ids, token_map


def load_teacher(spec: Model, *, tokenizer: Any, device: torch.device | str = "cpu") -> Any:
    """Load a teacher for a student.

    Args:
        spec: which model.
        tokenizer: the student's.
        device: where it is held.

    Raises:
        InputError: it cannot be loaded, its head does what its configuration does not say, or its
            tokens cannot be mapped.
    """
    model = load_frozen(spec, device=device)
    check_head(model, where=spec.path)
    if spec.map_tokens:
        size = text_config(model).vocab_size
        adopt_ids(model, token_map(tokenizer, load_tokenizer(spec), size=size, where=spec.path))
    return model
