"""Turns a batch into distillation targets: local models, adapter teachers, routed by source."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from torch import nn

from dominie.core.distributed import one_process_at_a_time
from dominie.core.errors import InputError
from dominie.data.batch import Batch, Span
from dominie.losses.targets import DenseTarget, Part, Signal
from dominie.models.attention_capture import TeacherAttention
from dominie.models.head import check_head, decoder, output_head, text_config
from dominie.models.info import ModelFlops, model_flops
from dominie.models.loading import load_frozen, load_tokenizer
from dominie.models.matching import reorder_vocabulary, token_map
from dominie.models.packed_attention import decoder_inputs
from dominie.models.placement import is_sharded
from dominie.models.spec import Model
from dominie.teachers.ahead import can_expect, expect_all, expect_next

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

#: peft's own name for the adapter that is trained; its files are where a model's files are.
STUDENT = "default"


class Teacher(Protocol):
    """Turns a batch into distillation targets: a model, a router or a cache."""

    def signal(self, batch: Batch) -> Signal:
        """Targets for the supervised positions of the rows that this teacher has targets for."""


class LocalTeacher:
    """A frozen causal language model.

    Only its decoder runs; its head meets the hidden states inside the loss, tile by tile, so that
    no logits are held.

    Args:
        model: frozen, in evaluation mode.
        attention_layers: layers whose query and key are kept for the attention loss.

    Attributes:
        needs_all_ranks: whether its forward pass needs every rank to run it at once.
    """

    def __init__(self, model: nn.Module, *, attention_layers: Collection[int] = ()) -> None:
        self.model = model
        self.needs_all_ranks = is_sharded(model)
        self._attention: TeacherAttention | None = None
        self.capture(attention_layers)

    def capture(self, layers: Collection[int]) -> None:
        """Keep query and key of these layers from now on; none without any."""
        if self._attention is not None:
            self._attention.detach()
        self._attention = TeacherAttention(self.model, layers) if layers else None

    def flops(self) -> ModelFlops:
        """Count what the FLOPs of its forward pass follow from."""
        return model_flops(self.model)

    @torch.no_grad()
    def signal(self, batch: Batch) -> Signal:
        """Hidden states [n, D_t] of supervised positions, the head, and captured projections."""
        hidden = decoder(self.model)(**decoder_inputs(self.model, batch)).last_hidden_state
        captured = self._attention.take() if self._attention else {}
        states = hidden.flatten(0, 1)[batch.positions]
        rows = torch.arange(len(batch.input_ids))
        return Signal((Part(rows, DenseTarget(states, output_head(self.model)), captured),))

    def predictions(self, batch: Batch) -> DenseTarget:
        """The hidden states and head of its `signal`."""
        return cast("DenseTarget", self.signal(batch).parts[0].target)

    @torch.no_grad()
    def run_for_other_ranks(self, device: torch.device) -> None:
        """Run the forward pass for other ranks, which need the shard of the weights on this one."""
        nothing = torch.zeros(1, 1, dtype=torch.long, device=device)
        decoder(self.model)(input_ids=nothing, use_cache=False)
        if self._attention:
            self._attention.take()


class AdapterTeacher(LocalTeacher):
    """A frozen teacher inside the student's model: another adapter, or the base alone.

    Args:
        model: the student, peft adapters over its base.
        adapter: folder of the teacher's adapter, None for the base alone.
        attention_layers: layers whose query and key are kept for the attention loss.

    Raises:
        InputError: the adapter cannot be loaded.
    """

    def __init__(
        self, model: Any, adapter: str | None = None, *, attention_layers: Collection[int] = ()
    ) -> None:
        if isinstance(model, AdapterTeacher):  # MindTeacher(Mind(model, adapter)), for one release
            vars(self).update(vars(model))
            self.capture(attention_layers)
            return
        super().__init__(model, attention_layers=attention_layers)
        self._adapter: str | None = None
        # Whoever saves the student does not save its teachers.
        if not isinstance(model.save_pretrained, functools.partial):
            model.save_pretrained = functools.partial(
                model.save_pretrained, selected_adapters=[STUDENT]
            )
        if adapter is None:
            return
        self._adapter = f"teacher_{len(model.peft_config)}"
        try:
            model.load_adapter(adapter, self._adapter, is_trainable=False)
        except Exception as error:
            raise InputError(
                "the adapter cannot be applied to the student's base",
                where=adapter,
                found=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}",
                do="check that the folder is complete and of one model",
            ) from error
        model.set_adapter(STUDENT)

    @contextlib.contextmanager
    def activated(self) -> Iterator[Any]:
        """Make the model this teacher for a while: no dropout, no other adapter."""
        model: Any = self.model
        training = model.training
        model.eval()
        if self._adapter is None:
            model.base_model.disable_adapter_layers()
        else:
            model.base_model.set_adapter(self._adapter, inference_mode=True)
        try:
            yield model
        finally:
            if self._adapter is None:
                model.base_model.enable_adapter_layers()
            else:
                model.base_model.set_adapter(STUDENT)
            model.train(training)

    def flops(self) -> ModelFlops:
        """Count the same without adapters, few as their weights are."""
        return model_flops(self.model, adapters=False)

    def signal(self, batch: Batch) -> Signal:
        """The targets of `LocalTeacher.signal`, of this adapter."""
        with self.activated():
            return super().signal(batch)


def load_teacher(
    spec: Model,
    *,
    tokenizer: Any,
    device: torch.device | str = "cpu",
    mesh: DeviceMesh | None = None,
) -> Any:
    """Load a teacher for a student.

    Args:
        spec: which model.
        tokenizer: the student's.
        device: that it runs on.
        mesh: of the processes that share it out if its placement says so, see `load_frozen`.

    Raises:
        InputError: it cannot be loaded, its head does what its configuration does not say, or its
            tokens cannot be mapped.
    """
    alone = mesh is None or spec.placed != "sharded"
    with contextlib.nullcontext() if alone else one_process_at_a_time():  # each loads it whole
        model = load_frozen(spec, device=device, mesh=mesh)
    check_head(model, where=spec.path)
    if spec.map_tokens:
        size = text_config(model).vocab_size
        reorder_vocabulary(
            model, token_map(tokenizer, load_tokenizer(spec), size=size, where=spec.path)
        )
    return model


class RoutedTeacher:
    """Sends each row to its teacher *before* any forward pass, so that no row is computed twice.

    Args:
        teachers: teachers by name.
        routes: for each source index the name of its teacher, None for a source without one.
    """

    def __init__(self, teachers: Mapping[str, Teacher], routes: Sequence[str | None]) -> None:
        self.teachers = dict(teachers)
        self.names = list(teachers)
        self.routes = [-1 if name is None else self.names.index(name) for name in routes]

    def signal(self, batch: Batch) -> Signal:
        """The parts of all teachers; `rows` of each are rows of `batch`.

        Raises:
            ValueError: a row holds conversations of two teachers (it was packed without routes).
        """
        routes: dict[int, int] = {}  # of each row
        for span in batch.spans:
            route = self.routes[span.source]
            if routes.setdefault(span.row, route) != route:
                raise ValueError("a packed row holds conversations of two teachers")
        parts: list[Part] = []
        device = batch.input_ids.device
        elsewhere = self._needed_by_any_rank(set(routes.values()), device)
        for index, name in enumerate(self.names):
            rows, teacher = [row for row in routes if routes[row] == index], self.teachers[name]
            if rows:
                signal, numbers = teacher.signal(batch.select(rows)), torch.tensor(rows)
                parts += [
                    dataclasses.replace(part, rows=numbers[part.rows]) for part in signal.parts
                ]
            elif name in elsewhere:
                cast("LocalTeacher", teacher).run_for_other_ranks(device)
        return Signal(tuple(parts))

    def expect_step(self, spans: Sequence[Span]) -> None:
        """Tell each teacher that asks for a step at once which conversations of it are its own."""
        for index, name in enumerate(self.names):
            expect_all(self.teachers[name], [s for s in spans if self.routes[s.source] == index])

    @property
    def expects(self) -> bool:
        """Whether any teacher can begin before it is asked."""
        teachers = self.teachers.values()
        return any(can_expect(each) or hasattr(each, "expect_step") for each in teachers)

    def expect(self, spans: Sequence[Span]) -> None:
        """Tell each teacher that can begin before which conversations it is asked for next."""
        for index, name in enumerate(self.names):
            expect_next(self.teachers[name], [s for s in spans if self.routes[s.source] == index])

    def _needed_by_any_rank(self, routes: Collection[int], device: torch.device) -> set[str]:
        """The teachers that need all ranks, if any rank has rows for them."""
        together = [
            (index, name)
            for index, name in enumerate(self.names)
            if getattr(self.teachers[name], "needs_all_ranks", False)
        ]
        if not together:
            return set()
        wanted = torch.tensor([int(index in routes) for index, _ in together], device=device)
        torch.distributed.all_reduce(wanted, op=torch.distributed.ReduceOp.MAX)
        return {
            name for (_, name), any_rank in zip(together, wanted.tolist(), strict=True) if any_rank
        }
