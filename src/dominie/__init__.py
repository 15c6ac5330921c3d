"""dominie: train small language models from large ones, align them to a domain, forget nothing."""

import sys
from typing import TYPE_CHECKING, Any

from dominie.deprecated import OldModules

__version__ = "0.1.0"
sys.meta_path.append(OldModules())  # after all others: only names that nobody else finds

if TYPE_CHECKING:
    from dominie.api import Run, check, evaluate, plan, run
    from dominie.recipe import Recipe, load_recipe

__all__ = ["Recipe", "Run", "__version__", "check", "evaluate", "load_recipe", "plan", "run"]

_MODULES = {"Recipe": "dominie.recipe", "load_recipe": "dominie.recipe"}


def __getattr__(name: str) -> Any:
    """Import a public name on first access, so that `import dominie` is quick."""
    if name not in __all__:
        raise AttributeError(f"module 'dominie' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_MODULES.get(name, "dominie.api")), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
