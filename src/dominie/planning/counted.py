"""Counts of models, kept on disk from plan to plan: counting takes the models' own code.

That code (transformers' models and PyTorch's compiler, which they import) takes longer to import
than all else that `dominie check` does.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from dominie.core.hardware import versions
from dominie.core.io import read_checksummed, write_checksummed

T = TypeVar("T")

_MOST = 2000  # counts that are kept
_here: dict[str, Any] = {}


def counted(config: Any, what: str, count: Callable[[], T], read: Callable[..., T]) -> T:
    """Count something of a model, or read what was counted before of the same by the same code.

    Args:
        config: the model's configuration; one with code of its own is counted every time.
        what: tells what is counted, apart from the configuration.
        count: counts it: an instance of a dataclass of numbers.
        read: makes one again of its fields.
    """
    text = config.to_json_string(use_diff=False)
    key = hashlib.sha256("\0".join((_code(), text, what)).encode()).hexdigest()[:32]
    if key in _here:
        return _here[key]  # type: ignore[no-any-return]
    own = bool(getattr(config, "auto_map", None))
    with contextlib.suppress(OSError, ValueError, TypeError, RuntimeError, AttributeError):
        if not own and (fields := read_checksummed(_place()).get(key)) is not None:
            found = _here[key] = read(**fields)
            return found
    made = _here[key] = count()
    if not own:
        _keep(key, dataclasses.asdict(made))  # type: ignore[call-overload]
    return made


def _keep(key: str, fields: Mapping[str, Any]) -> None:
    kept: dict[str, Any] = {}
    with contextlib.suppress(OSError, ValueError, RuntimeError):
        kept = read_checksummed(_place())
    recent = [*kept.items(), (key, fields)][-_MOST:]
    with contextlib.suppress(OSError, RuntimeError):  # then it is counted again next time
        _place().parent.mkdir(parents=True, exist_ok=True)
        write_checksummed(_place(), dict(recent))


@functools.cache
def _code() -> str:
    """What tells the code that counts: versions of libraries, and the source of this package."""
    digest = hashlib.sha256(repr(versions(("torch", "transformers", "peft"))).encode())
    package = Path(__file__).parents[1]
    for folder in ("planning", "models"):
        for file in sorted((package / folder).glob("*.py")):
            digest.update(file.read_bytes())
    return digest.hexdigest()


def _place() -> Path:
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "dominie" / "counts.json"
