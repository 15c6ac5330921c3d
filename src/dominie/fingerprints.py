"""What a result depends on, as one short text that changes exactly when any of it does."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dominie.models.spec import Model
from dominie.recipe import Recipe

#: Part of every fingerprint: raised when the same recipe would come to something else.
FORMAT = 1


def digest(*parts: Any) -> str:
    """16 hexadecimal digits of anything JSON can hold."""
    text = json.dumps([FORMAT, *parts], sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def stage_fingerprint(
    recipe: Recipe, name: str, *, rows: Mapping[str, str], models: Mapping[str, str]
) -> str:
    """What a stage's model depends on.

    Args:
        recipe: the resolved recipe.
        name: of the stage.
        rows: digest of the training rows of each source the stage learns from.
        models: fingerprint of each model the stage needs, by the recipe's name for it.
    """
    stage = recipe.stages[name]
    train = dataclasses.asdict(stage.train)
    for key in ("log_every", "checkpoint_every"):
        train.pop(key)
    if stage.train.keep == "last" and stage.train.patience is None:
        for key in ("evaluate_every", "evaluate_rows"):
            train.pop(key)  # then it changes what is seen, not what is learnt
    sources = {}
    for source in stage.active:
        teacher = stage.teacher_on(source)
        sources[source] = {
            "share": stage.data[source].share,
            "loss": dataclasses.asdict(stage.loss_on(source)),
            "teacher": teacher and models[teacher],
            "rows": rows[source],
        }
    return digest(train, models[stage.student], sources)


def model_fingerprint(spec: Model) -> str:
    """A model that no stage makes: by name on the hub, by sizes and times of files in a folder."""
    files = []
    for path in (spec.path, spec.adapter):
        if path and Path(path).is_dir():
            files += [
                (entry.name, entry.stat().st_size, entry.stat().st_mtime_ns)
                for entry in sorted(Path(path).iterdir())
                if entry.is_file()
            ]
    return digest(dataclasses.asdict(spec), files)
