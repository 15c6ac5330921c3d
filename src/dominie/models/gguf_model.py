"""Models in GGUF files: configuration, tokenizer, and the folder that one is dequantised to.

transformers' own loader reads them (its `gguf_file`). It takes seconds to read a large vocabulary,
and holds all weights in memory while it dequantises them.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock

from dominie.core.content_hash import content_hashes
from dominie.core.errors import DominieError, InputError, RunError
from dominie.core.io import fsync, manifest_error, read_checksummed, remove, write_checksummed
from dominie.models.gguf_header import GgufHeader, read_header
from dominie.models.spec import Model

logger = logging.getLogger(__name__)

#: In the folder: which file it was made of, and the sizes of its own files.
_RECORD = ".gguf.json"
_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


def gguf_config(spec: Model) -> Any:
    """The configuration of the model in a GGUF file.

    Raises:
        InputError: it is none that transformers can read.
    """
    header = read_header(spec.path)
    config = copy.deepcopy(_config(*_state(spec.path)))
    config.dtype = _torch_dtype(stored_dtype(spec, header))
    return config


def gguf_tokenizer(spec: Model) -> Any:
    """The tokenizer of a GGUF file with its chat template, as the dequantised folder has it.

    Raises:
        InputError: it is none that transformers can read, or one that cannot be used safely.
    """
    read_header(spec.path)
    return copy.deepcopy(_tokenizer(*_state(spec.path)))


def stored_dtype(spec: Model, header: GgufHeader) -> str:
    """The dtype that the dequantised weights are written in: the model's `dtype`, or the file's.

    What was rounded to blocks of few bits is dequantised to fp32, which holds it exactly.
    """
    return header.dtype if spec.dtype == "auto" else spec.dtype


def dequantised(spec: Model, folder: Path) -> Path:
    """Dequantise a GGUF file into a folder that transformers loads, or find it already made.

    Args:
        spec: of the file; its `dtype` is that of the weights.
        folder: where to put it, by the file's name, the hash of its content and the dtype; made if
            it is not there. Other processes that want the same wait.

    Returns:
        The model's folder. It is either whole or not there.

    Raises:
        InputError: the file is no model that transformers can dequantise.
        RunError: the disk has no room for it.
    """
    header, file = read_header(spec.path), Path(spec.path)
    dtype, (content,) = stored_dtype(spec, header), content_hashes([file])
    target = folder / f"{file.stem}-{content[:16]}-{dtype}"
    if _is_whole(target):
        return target
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / f".{target.name}.lock"):
        if _is_whole(target):
            return target
        size = header.parameters * _BYTES[dtype]
        if (free := shutil.disk_usage(folder).free) < size:
            raise RunError(
                "the disk has no room for the weights of a GGUF file",
                where=str(folder),
                expected=f"{size / 1e9:.1f} GB for {file.name} in {dtype}",
                found=f"{free / 1e9:.1f} GB",
                do="choose another place with --runs DIR, or set dtype: bf16 under models",
            )
        logger.warning(
            "dequantising %s once, to %.1f GB in %s (%s)", file.name, size / 1e9, dtype, target
        )
        with tempfile.TemporaryDirectory(prefix=".making-", dir=folder) as scratch:
            made = Path(scratch) / target.name
            _write(spec, made, dtype)
            sizes = {path.name: {"size": path.stat().st_size} for path in made.iterdir()}
            record = {"file": file.name, "content": content, "rounded": header.rounded}
            write_checksummed(made / _RECORD, {**record, "files": sizes})
            for path in made.iterdir():
                fsync(path)
            remove(target)  # files that are missing or have other sizes
            made.rename(target)
            fsync(folder)
    return target


def _is_whole(folder: Path) -> bool:
    try:
        return not manifest_error(folder, read_checksummed(folder / _RECORD)["files"], hashes=False)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _write(spec: Model, folder: Path, dtype: str) -> None:
    from transformers import AutoModelForCausalLM

    from dominie.models.loading import check_complete

    options: dict[str, Any] = {"dtype": _torch_dtype(dtype), "output_loading_info": True}
    with contextlib.suppress(ImportError):  # before it, transformers always dequantised
        from transformers import GgufConfig

        options["quantization_config"] = GgufConfig(dequantize=True)
    with _reading(spec.path, "model"):
        model, found = AutoModelForCausalLM.from_pretrained(
            str(Path(spec.path).parent), gguf_file=Path(spec.path).name, **options
        )
    check_complete(found, where=spec.path)
    vars(model.config).pop("quantization_config", None)  # they no longer are
    model.hf_quantizer, model.is_quantized = None, False
    model.save_pretrained(folder)
    gguf_tokenizer(spec).save_pretrained(folder)


@functools.lru_cache(maxsize=8)
def _config(path: str, *_: int) -> Any:
    from transformers import AutoConfig

    header = read_header(path)
    with _reading(path, "configuration"):
        config = AutoConfig.from_pretrained(str(Path(path).parent), gguf_file=Path(path).name)
        config = config.get_text_config()
    kind = header.metadata.get(f"{header.architecture}.rope.scaling.type", "none")
    scaled = kind != "none" or "rope_freqs.weight" in header.shapes
    rope = getattr(config, "rope_parameters", None)
    if scaled and isinstance(rope, dict) and rope.get("rope_type", "default") == "default":
        logger.warning(
            "%s: it scales the frequencies of its positions, which transformers does not read of a "
            "GGUF file; the model is not quite the one that was quantised",
            path,
        )
    return config


@functools.lru_cache(maxsize=8)
def _tokenizer(path: str, *_: int) -> Any:
    from transformers import AutoTokenizer

    from dominie.models.loading import load_tokenizer

    with tempfile.TemporaryDirectory(prefix="dominie-") as scratch:
        with _reading(path, "tokenizer"):
            found = AutoTokenizer.from_pretrained(str(Path(path).parent), gguf_file=Path(path).name)
            found.save_pretrained(scratch)
        # As from the folder that it is dequantised to: what depends on tokens knows both by one
        # hash. And it is tried out in a child process, as any tokenizer is.
        tokenizer = load_tokenizer(Model(path=scratch))
    tokenizer.name_or_path = path
    return tokenizer


@contextlib.contextmanager
def _reading(path: str, what: str) -> Iterator[None]:
    """Turn whatever transformers raises into one message that names the file and its family."""
    try:
        yield
    except DominieError:
        raise
    except Exception as error:
        header = read_header(path)
        raise InputError(
            f"transformers cannot read the {what} of this GGUF file",
            where=path,
            expected="a family and types of weights that it can dequantise",
            found=f"family {header.architecture}, {header.rounded or 'floats'}: "
            f"{type(error).__name__}: {' '.join(str(error).split())[:200]}",
            do="name a folder or hub id of the model before it was quantised",
        ) from error


def _state(path: str) -> tuple[str, int, int]:
    """What tells a file from what lay in its place before."""
    stat = Path(path).stat()
    return path, stat.st_size, stat.st_mtime_ns


def _torch_dtype(name: str) -> Any:
    from dominie.models.loading import DTYPES

    return DTYPES[name]
