"""On PYTHONPATH: each Python finds what a machine with PyTorch has, and the wheels brought along.

BARE_BROUGHT names a file of wheels, one `name==version` a line; what it names is found. The script
that BARE_FAILS names ends with status 3 before it begins.
"""

from __future__ import annotations

import importlib.machinery
import os
import sys
from pathlib import Path

#: Import names by the name of the package; what dominie or its peers can use, and is not there.
#: httpx2 is not: transformers' own hub library may need it.
ABSENT = {
    "bitsandbytes": "bitsandbytes", "datasets": "datasets", "deepspeed": "deepspeed",
    "dill": "dill", "gguf": "gguf",
    "liger-kernel": "liger_kernel", "lm_eval": "lm_eval",
    "mistral_common": "mistral_common", "multiprocess": "multiprocess", "openai": "openai",
    "pcodec": "pcodec", "pydantic": "pydantic", "pydantic-core": "pydantic_core",
    "annotated-types": "annotated_types", "typing-inspection": "typing_inspection",
    "ruamel.yaml": "ruamel", "sentencepiece": "sentencepiece", "torchao": "torchao", "trl": "trl",
}  # fmt: skip
#: What is there where wheels are brought along, but need not be.
PERHAPS = {"jinja2", "pandas", "rich", "tensorboard", "typer", "xdist"}


def brought() -> set[str]:
    """The names of the wheels."""
    file = os.environ.get("BARE_BROUGHT")
    lines = Path(file).read_text(encoding="utf-8").splitlines() if file else []
    return {line.split("==")[0].strip() for line in lines if "==" in line}


HIDDEN = {module for name, module in ABSENT.items() if name not in brought()}
HIDDEN |= set() if brought() else PERHAPS


class Bare(importlib.machinery.PathFinder):
    """Finds nothing of what is absent, for an import as for a library that looks whether it is."""

    @classmethod
    def find_spec(cls, fullname, path=None, target=None):
        absent = fullname.partition(".")[0] in HIDDEN
        return None if absent else super().find_spec(fullname, path, target)


sys.meta_path[sys.meta_path.index(importlib.machinery.PathFinder)] = Bare
failing = os.environ.get("BARE_FAILS")
if failing and any(Path(each).name == failing for each in sys.orig_argv[1:]):
    print(f"{failing} fails on purpose", file=sys.stderr)
    os._exit(3)
