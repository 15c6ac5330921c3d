"""A teacher that shares the student's weights: one base, many minds."""

from __future__ import annotations

from collections.abc import Collection

from dominie.data.batches import Batch
from dominie.losses.signal import Signal
from dominie.models.minds import Mind
from dominie.teachers.local import LocalTeacher


class MindTeacher:
    """Speaks with its own adapter, or with none, and leaves the model to the student.

    Args:
        mind: the teacher within the student's model.
        attention_layers: layers whose query and key are kept for the attention loss.
    """

    def __init__(self, mind: Mind, *, attention_layers: Collection[int] = ()) -> None:
        self.mind = mind
        self._local = LocalTeacher(mind.model, attention_layers=attention_layers)

    def signal(self, batch: Batch) -> Signal:
        """What `LocalTeacher` says, in this mind."""
        with self.mind.awake():
            return self._local.signal(batch)
