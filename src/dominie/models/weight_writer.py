"""Writes a model's weights a tensor at a time, and refuses those that are no model."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dominie.core.errors import InputError
from dominie.models.weights import DTYPES, Weights

SHARD = "4GB"

_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_INDEX = "model.safetensors.index.json"


def write_weights(
    folder: Path,
    shapes: Mapping[str, Tensor],
    made: Callable[[str], Tensor],
    read: Mapping[str, Weights],
) -> None:
    """Write tensors as transformers does, shard by shard; memory holds one tensor at a time.

    Args:
        folder: made if need be; gets `*.safetensors` and, of several, their index.
        shapes: every tensor that will be written, without storage.
        made: gives the tensor of a name.
        read: the models that it is made of, by name.

    Raises:
        InputError: not finite; or the embedding, the head or most matrices are zeros.
    """
    from huggingface_hub import split_torch_state_dict_into_shards

    folder.mkdir(parents=True, exist_ok=True)
    plan = split_torch_state_dict_into_shards(dict(shapes), max_shard_size=SHARD)
    zeros: dict[str, bool] = {}  # of each matrix

    def checked(name: str) -> Tensor:
        tensor = made(name)
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise _not_finite(name, tensor, read)
        if tensor.ndim > 1:
            zeros[name] = not tensor.any()
        return tensor

    for file, names in plan.filename_to_tensors.items():
        _write_file(folder / file, {name: shapes[name] for name in names}, checked)
    found = [name for name, is_zero in zeros.items() if is_zero]
    vocabulary = ("embed_tokens.weight", "lm_head.weight")
    if any(name.endswith(vocabulary) for name in found) or 2 * len(found) > len(zeros):
        raise InputError(
            "the weights would be zeros; no model is made of them",
            where=", ".join(read),
            found=f"{len(found)} of {len(zeros)} matrices, such as {min(found)}",
            do="download these models again, or change their weights, which may cancel out",
        )
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / _INDEX).write_text(json.dumps(index, indent=1, sort_keys=True), encoding="utf-8")


def _not_finite(name: str, tensor: Tensor, read: Mapping[str, Weights]) -> InputError:
    """The error of a tensor that is not finite; names the models that brought it in."""
    broken = [
        f"{model} in {each}"
        for model, weights in read.items()
        for each, shape in weights.shapes.items()
        if shape.is_floating_point() and not weights[each].isfinite().all()
    ]
    return InputError(
        "the weights would not be finite; no model is made of them",
        where=name,
        found=", ".join(broken[:3])
        or f"every model read is finite, not their result in {tensor.dtype}",
        do="download the models that are named again; if none is, use smaller weights or noise",
    )


def _write_file(path: Path, shapes: Mapping[str, Tensor], made: Callable[[str], Tensor]) -> None:
    """A safetensors file: the length of its header, the header, the bytes of each tensor.

    The format's own `save_file` wants all tensors of a file at once.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    # The widest first, as the format asks, so that each begins at a multiple of its width.
    names = sorted(shapes, key=lambda name: (-shapes[name].element_size(), name))
    start = 0
    for name in names:
        shape, end = shapes[name], start + shapes[name].numel() * shapes[name].element_size()
        dtype = _DTYPE_NAMES[shape.dtype]
        header[name] = {"dtype": dtype, "shape": list(shape.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for name in names:
            tensor = made(name).contiguous()
            if (tensor.shape, tensor.dtype) != (shapes[name].shape, shapes[name].dtype):
                raise ValueError(f"{name} was announced as {shapes[name]}, made as {tensor}")
            file.write(tensor.flatten().view(torch.uint8).numpy().data)
