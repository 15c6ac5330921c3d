"""Which conversations of a step the student answers, from which prompt, and how long at most."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from dominie.data.row_store import Turn, turn_of
from dominie.training.dataloader import FixedRows
from dominie.training.rollouts import RolloutKey, RolloutSettings
from dominie.training.student_answers import AskedAnswer

#: Answers that have less room than they may be long get a multiple of this, so that they are
#: generated together.
_ROOM = 32


@dataclass(frozen=True)
class Planned:
    """A conversation of a step: of the data, or to be answered under a key."""

    source: int
    row: int
    key: RolloutKey | None


class RolloutPlan:
    """Says of every conversation of a run whether the student answers it.

    A coin of the conversation's own decides. The plan depends on the arguments alone, and so is
    that of a run which goes on.

    Args:
        rows: the steps with the answers of the data.
        fractions: of each source the fraction of its conversations that the student answers.
        settings: the stage's `rollouts`.
        seed: of the run.
        max_length: tokens in the longest conversation.
    """

    def __init__(
        self,
        rows: FixedRows,
        fractions: Sequence[float],
        *,
        settings: RolloutSettings,
        seed: int,
        max_length: int,
    ) -> None:
        self.rows, self.fractions, self.settings = rows, list(fractions), settings
        self.seed, self.max_length = seed, max_length

    def of_step(self, step: int) -> list[Planned]:
        """The conversations of a step, in order, and which of them the student answers."""
        seen: Counter[tuple[int, int]] = Counter()
        plan = []
        for source, row in self.rows.indices(step):
            key = RolloutKey(step + 1, self.rows.sources[source], row, seen[source, row])
            seen[source, row] += 1
            each = Planned(source, row, key)
            own = key.uniform(self.seed, "coin") < self.fractions[source]
            own = own and 0 < len(self.turn(each).prompt) < self.max_length
            plan.append(each if own else Planned(source, row, None))
        return plan

    def turn(self, planned: Planned) -> Turn:
        """The turn of a conversation that is answered anew."""
        draw = None
        if self.settings.turn == "random" and planned.key is not None:
            draw = planned.key.uniform(self.seed, "turn")
        return turn_of(self.rows.row(planned.source, planned.row), draw)

    def asked(self, plans: Iterable[Sequence[Planned]], first: int) -> list[AskedAnswer]:
        """Every answer that is wanted for steps that are answered at once.

        Args:
            plans: of the steps.
            first: of them, counted from 0.
        """
        found, most = [], self.settings.longest_at(first, self.rows.steps)
        for plan in plans:
            for each in plan:
                if each.key is not None:
                    prompt = self.turn(each).prompt
                    room = min(most, self.max_length - len(prompt))
                    if _ROOM < room < most:
                        room -= room % _ROOM
                    found.append(AskedAnswer(each.key, prompt, room))
        return found
