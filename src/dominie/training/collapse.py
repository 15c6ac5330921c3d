"""Says when a mixture of experts stops using one of its experts."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

logger = logging.getLogger(__name__)

#: An expert with less than this of its fair share of the routing weight is not used …
STARVED = 0.1
#: … when it has been so for this many lines of metrics; a single one may be of a few tokens …
LINES = 3
#: … and this many steps: a router that is made anew prefers some, and mostly gets over it.
STEPS = 50


class CollapseWatch:
    """Looks at the routers' means line by line, and warns once a stage."""

    def __init__(self) -> None:
        self.warned = False
        self._starved: dict[tuple[int, int], list[int]] = {}

    def look(self, router: Mapping[str, Sequence[Sequence[float]]] | None, step: int) -> None:
        """Warn where an expert gets next to nothing, line after line.

        Args:
            router: as `Meter.means` has it; None of a dense student.
            step: of the line.
        """
        if router is None or self.warned:
            return
        for layer, load in enumerate(router["load"]):
            for expert, share in enumerate(load):
                place = (layer, expert)
                if share * len(load) >= STARVED:
                    self._starved.pop(place, None)
                    continue
                seen = self._starved.setdefault(place, [])
                seen.append(step)
                if len(seen) >= LINES and step - seen[0] >= STEPS and not self.warned:
                    self._warn(layer, expert, share)

    def _warn(self, layer: int, expert: int, share: float) -> None:
        self.warned = True
        logger.warning(
            "the router is collapsing: expert %d of layer %d gets %.2g %% of the routing weight. "
            "Where tokens go to some of the experts, load balancing keeps all in use: "
            "loss: {router: 0.01}",
            expert,
            layer,
            100 * share,
        )
