"""What a stage is planned from: what is known of its models, and how much data there is."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.resources import files
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from dominie.core.errors import InputError, hub_error
from dominie.data.conversations import read_conversations
from dominie.data.data_files import exists, expanded
from dominie.data.sources import Source
from dominie.models.gguf_header import is_gguf
from dominie.models.info import ModelFlops, ModelInfo, active_experts, info_of, model_flops
from dominie.models.loading import check_sizes, load_config
from dominie.models.model_folder import base_and_adapter
from dominie.models.spec import Model, allowed
from dominie.planning.counted import counted
from dominie.planning.trace import Pass, bare_model
from dominie.recipe import Recipe
from dominie.recipe.validate import stage_order
from dominie.toyworld import is_toyworld, materialise
from dominie.training.dataloader import total_conversations
from dominie.training.settings import Lora

if TYPE_CHECKING:
    from dominie.recipe import TrainStage

#: In a wheel they are beside the package's modules, in the source in `recipes/configs`.
_SHIPPED = (Path(str(files("dominie"))) / "configs", Path(__file__).parents[3] / "recipes/configs")


def plan_info(recipe: Recipe, name: str) -> ModelInfo:
    """Describe a model, or what a stage will make.

    Raises:
        InputError: no configuration can be reached.
    """
    stage = recipe.stages.get(name)
    if stage is None:
        spec = recipe.model(name)
        return info_of(load_plan_config(spec), spec=spec, name=name)
    info = stage.model_info(name, lambda model: plan_info(recipe, model))
    return replace(info, spec=Model(path=name))


def load_plan_config(spec: Model) -> Any:
    """A configuration from a folder, the hub's cache, those shipped here, else the hub.

    Raises:
        InputError: it is in none of these places.
    """
    from transformers import AutoConfig

    if is_toyworld(spec.path):
        return _toy_config(spec.path)
    base, _ = base_and_adapter(spec)
    if is_gguf(base):
        return load_config(spec)
    options: dict[str, Any] = {"revision": spec.revision, "trust_remote_code": allowed()}
    places = [(base, {"local_files_only": True})]
    if (shipped := shipped_config(base)) is not None and not Path(base).is_dir():
        places.append((str(shipped), {}))
    elif not Path(base).exists() and not base.startswith((".", "/", "~")):
        places.append((base, {}))
    for place, more in places:
        try:
            check_sizes(place, spec.revision, **more)
            return AutoConfig.from_pretrained(place, **options, **more)
        except InputError:  # it was read, and is refused
            raise
        except Exception as error:
            fault = error
    raise hub_error(fault)(
        "no configuration of this model can be reached",
        where=spec.path,
        expected="a folder with config.json, a model of the hub, or one of those shipped: "
        + ", ".join(shipped_names()),
        found=f"{type(fault).__name__}: {' '.join(str(fault).split())[:200]}",
        do="put the model's config.json into a folder and name the folder as its path",
    ) from fault


def shipped_config(path: str) -> Path | None:
    """The file of a configuration that comes with dominie, by the last two parts of a path."""
    name = "--".join(Path(path).parts[-2:]) + ".json"
    return next((folder / name for folder in _SHIPPED if (folder / name).is_file()), None)


def shipped_names() -> list[str]:
    """Models whose configuration comes with dominie."""
    found = {path.stem.replace("--", "/") for folder in _SHIPPED for path in folder.glob("*.json")}
    return sorted(found)


def _toy_config(path: str) -> Any:
    from dominie.toyworld.names import parsed
    from dominie.toyworld.toy_models import toy_config

    request = parsed(path)
    return toy_config(request.thing, width=request.width, layers=request.layers)


#: Characters of a token, if there is no tokenizer at hand: about those of English text.
CHARACTERS_PER_TOKEN = 4
#: Tokens that a chat template adds to a turn.
_TEMPLATE_TOKENS = 6
#: Conversations whose length is looked at.
_LOOKED_AT = 1000
#: Conversations of a source that is not here.
_ASSUMED = 100_000


@dataclass(frozen=True)
class Size:
    """Of a source: conversations to train on, their lengths in tokens, and where that is from."""

    conversations: int
    mean: float
    longest: float
    known: bool


def source_sizes(
    recipe: Recipe, *, conversations: int | None, tokens: float | None
) -> dict[str, Size]:
    """The size of every source of a recipe.

    Args:
        recipe: the recipe.
        conversations: of each source whose data are not here; None assumes 100,000.
        tokens: of a conversation; None is read from the data, or the most there can be.
    """
    sizes = {
        name: _size(source, recipe, conversations, tokens) for name, source in recipe.data.items()
    }
    for name in stage_order(recipe, where=recipe.name):
        if recipe.stages[name].makes == "data":
            counts = {source: size.conversations for source, size in sizes.items()}
            found = recipe.stages[name].conversations(counts) or conversations
            unbounded = float("inf")
            sizes[name] = Size(found or _ASSUMED, tokens or unbounded, unbounded, False)
    return sizes


def _size(source: Source, recipe: Recipe, conversations: int | None, tokens: float | None) -> Size:
    trained = 1 - source.held_out_fraction
    if conversations is None or tokens is None:
        with tempfile.TemporaryDirectory() as scratch:
            lengths, found = _looked_at(source, Path(scratch), recipe.train.seed)
        if lengths:
            mean = tokens or sum(lengths) / len(lengths)
            count = conversations or found
            return Size(max(1, round(count * trained)), mean, tokens or max(lengths), True)
    count = conversations or _ASSUMED
    unbounded = float("inf")
    return Size(max(1, round(count * trained)), tokens or unbounded, unbounded, False)


def _looked_at(source: Source, scratch: Path, seed: int) -> tuple[list[float], int]:
    """Estimated tokens of the first conversations, and how many there are in all."""
    is_toy = is_toyworld(source.path)
    if is_toy:
        source = replace(source, path=str(materialise(source.path, scratch, seed=seed)))
    if not exists(expanded(source.path)):
        return [], 0
    lengths: list[float] = []
    for conversation in islice(read_conversations(source), _LOOKED_AT):
        texts = [str(message["content"] or "") for message in conversation.messages]
        counted = sum(len(t.split()) if is_toy else len(t) / CHARACTERS_PER_TOKEN for t in texts)
        lengths.append(counted + _TEMPLATE_TOKENS * len(texts))
    if len(lengths) < _LOOKED_AT:
        return lengths, len(lengths)
    return lengths, max(len(lengths), sum(map(_rows, source.local_files())))


def _rows(path: Path) -> int:
    """Rows of a file: its line ends, or what the footer of a Parquet file says."""
    if path.suffix.lower() == ".parquet":
        import pyarrow.parquet

        return int(pyarrow.parquet.ParquetFile(path).metadata.num_rows)
    with path.open("rb") as file:
        return sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b""))


@dataclass(frozen=True)
class Work:
    """What a stage runs through.

    Attributes:
        steps: of the optimiser.
        conversations: in all of them.
        tokens: in all of them.
        rows: of the largest micro-batch.
        length: tokens of a row of it.
        known: whether the data were looked at.
    """

    steps: int
    conversations: int
    tokens: float
    rows: int
    length: int
    known: bool


def work_of(stage: TrainStage, sizes: Mapping[str, Size], micro_batch: int) -> Work:
    """The steps of a stage, and the largest batch that its data can make.

    Args:
        stage: the stage.
        sizes: of the recipe's sources.
        micro_batch: conversations of a forward pass.
    """
    train = stage.train
    shares = {name: stage.data[name].share for name in stage.active}
    whole = sum(shares.values())
    counts = {name: sizes[name].conversations for name in shares}
    steps = train.steps or max(
        1, round(total_conversations(counts, shares, train.epochs) / train.batch)
    )
    limit = train.max_length
    mean = sum(min(sizes[n].mean, limit) * share / whole for n, share in shares.items())
    longest = min(max(sizes[name].longest for name in shares), limit)
    rows, length = micro_batch, longest
    if train.packing:  # several to a row: the fewer, fuller rows of what would be padded
        rows = max(1, min(micro_batch, -(-int(micro_batch * longest) // limit)))
        length = min(limit, micro_batch * longest)
    return Work(
        steps=steps,
        conversations=steps * train.batch,
        tokens=steps * train.batch * mean,
        rows=rows,
        length=max(2, round(length)),
        known=all(sizes[name].known for name in shares),
    )


@dataclass(frozen=True)
class Shape:
    """Counts of a model.

    Attributes:
        parameters: all weights.
        active: weights that a token passes through: of a mixture's experts those it is sent to.
        flops: what the FLOPs of a forward pass follow from.
        experts: weights of a mixture's experts, which are joined as they are loaded.
        quantisable: weights of linear layers but the head, and of experts: what 8 or 4 bits hold.
        in_layers: weights of all layers, without embeddings, last norm and head.
        largest_layer: weights of the layer that has most.
        vocabulary: rows of the head.
        width: of a hidden state.
        layers: of the model.
        heads: of an attention layer.
        key_heads: of its keys.
        head_width: of a query.
        tied: whether the head is the embedding table.
    """

    parameters: int
    active: int
    flops: ModelFlops
    experts: int
    quantisable: int
    in_layers: int
    largest_layer: int
    vocabulary: int
    width: int
    layers: int
    heads: int
    key_heads: int
    head_width: int
    tied: bool


def shape_of(config: Any) -> Shape:
    """The counts of a model of this configuration."""

    def read(flops: Mapping[str, Any], **counts: Any) -> Shape:
        return Shape(flops=_flops(**flops), **counts)

    return counted(config, "shape", lambda: _shape(config), read)


def training_flops(config: Any, lora: Lora | None) -> ModelFlops:
    """What the FLOPs of a training pass follow from."""
    run = Pass(rows=1, length=2, dtype="bf16", trained=True, lora=lora)
    what = f"FLOPs of training {lora!r}"
    return counted(config, what, lambda: model_flops(bare_model(config, run)), _flops)


def _flops(attended: Mapping[str, float], **counts: Any) -> ModelFlops:  # JSON's keys are text
    widths = {None if key == "null" else int(key): width for key, width in attended.items()}
    return ModelFlops(attended=widths, **counts)


def _shape(config: Any) -> Shape:
    model = bare_model(config, Pass(rows=1, length=2, dtype="bf16"))
    parameters = sum(p.numel() for p in model.parameters())
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    info = info_of(config)
    active = parameters - round(experts * (1 - active_experts(info)))
    head = model.get_output_embeddings().weight
    tied = head is model.get_input_embeddings().weight
    linear = [m.weight for m in model.modules() if isinstance(m, nn.Linear)]
    layers = model.get_decoder().layers
    sizes = [sum(p.numel() for p in layer.parameters()) for layer in layers]
    return Shape(
        parameters=parameters,
        active=active,
        flops=model_flops(model),
        experts=experts,
        quantisable=sum(w.numel() for w in linear if w is not head) + experts,
        in_layers=sum(sizes),
        largest_layer=max(sizes),
        vocabulary=head.shape[0],
        width=head.shape[1],
        layers=len(layers),
        heads=info.heads or 0,
        key_heads=info.key_heads or 0,
        head_width=info.head_size or 0,
        tied=tied,
    )
