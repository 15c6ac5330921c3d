"""Run a benchmark as on a machine that has torch, transformers, accelerate and peft, and no more.

python tests/benchmarks/bare_machine.py SCRIPT [ARGUMENT …]; of several scripts joined by commas all
are imported and none is run.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import runpy
import sys
from pathlib import Path

ABSENT = {
    "bitsandbytes", "datasets", "deepspeed", "hypothesis", "jinja2", "liger_kernel", "lm_eval",
    "mistral_common", "openai", "pandas", "pydantic", "rich", "ruamel", "sentencepiece",
    "tensorboard", "torchao", "trl", "typer", "xdist",
}  # fmt: skip


class Bare(importlib.machinery.PathFinder):
    """Finds nothing of what is absent, for an import as for a library that looks whether it is."""

    @classmethod
    def find_spec(cls, fullname, path=None, target=None):
        absent = fullname.partition(".")[0] in ABSENT
        return None if absent else super().find_spec(fullname, path, target)


sys.meta_path[sys.meta_path.index(importlib.machinery.PathFinder)] = Bare
scripts = sys.argv[1].split(",")
sys.path.insert(0, str(Path(scripts[0]).parent))
if len(scripts) == 1:
    sys.argv = sys.argv[1:]
    runpy.run_path(scripts[0], run_name="__main__")
for script in scripts[1:] and scripts:
    importlib.import_module(Path(script).stem)
