"""From the rows of the evidence to the picture of docs/evidence.md: general against domain."""

from __future__ import annotations

from typing import TYPE_CHECKING

from evidence_tables import REFERENCE, scores_of
from markupsafe import Markup

from dominie.core.task_result import estimate
from dominie.report.scatter import Mark, pareto_front, scatter_chart

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from evidence_tables import Row

    from dominie.core.task_result import Estimate

# The classes of the report's charts; as a file of its own a picture follows the reader's theme.
_STYLE = """
svg { background: #fdfcfa; --paper: #fdfcfa; --ink: #1d2025; --soft: #5d626b; --hair: #ebe8e1;
  --rule: #dcd8cf; --accent: #1f5fa8; font-family: Inter, system-ui, sans-serif; }
@media (prefers-color-scheme: dark) { svg { background: #16181c; --paper: #16181c;
  --ink: #e6e4df; --soft: #a3a7ae; --hair: #282c33; --rule: #363a42; --accent: #7db4f5; } }
text { font-size: 12.5px; fill: var(--soft); }
.name { font: italic 15px Georgia, serif; fill: var(--ink); }
.label { font-size: 13px; font-weight: 500; fill: var(--ink); paint-order: stroke;
  stroke: var(--paper); stroke-width: 4px; stroke-linejoin: round; }
.label.chosen { font-weight: 700; fill: var(--accent); }
.grid { stroke: var(--hair); } .axis { stroke: var(--rule); }
.front { fill: none; stroke: var(--accent); stroke-width: 1.5; stroke-dasharray: 5 4; }
.whisker { stroke: var(--soft); stroke-width: 1.5; opacity: .6; }
.whisker.chosen { stroke: var(--accent); opacity: 1; }
.dot { fill: var(--ink); stroke: var(--paper); stroke-width: 1.5; }
.dot.chosen { fill: var(--accent); }
"""


def scatter(rows: Sequence[Row], cell: tuple[str, str], *, least: float = 0.0) -> str:
    """The models of one group and setting as an SVG file, with 95 % intervals over seeds.

    Args:
        rows: of the evidence.
        cell: the group and its setting.
        least: models with a lower general score are left out, so that the rest stand apart.
    """
    found = {
        model: both
        for model, seeds in scores_of(rows)[cell].items()
        if (both := _both(seeds)) and both[0].mean >= least
    }
    marks = [
        Mark(
            name=model,
            x=general.mean,
            y=domain.mean,
            x_ends=general.ends,
            y_ends=domain.ends,
            chosen=model == REFERENCE,
        )
        for model, (general, domain) in found.items()
    ]
    front = pareto_front({mark.name: (mark.x, mark.y) for mark in marks})
    drawn = scatter_chart("general", "domain", marks, [], front=front)
    head = Markup('<svg xmlns="http://www.w3.org/2000/svg" ')
    return str(drawn.replace("<svg ", head, 1).replace(">", Markup(f"><style>{_STYLE}</style>"), 1))


def _both(seeds: Mapping[str, Mapping[str, float]]) -> tuple[Estimate, Estimate] | None:
    pairs = [(t["general"], t["domain"]) for t in seeds.values() if {"general", "domain"} <= set(t)]
    if not pairs:
        return None
    general, domain = zip(*pairs, strict=True)
    return estimate(general), estimate(domain)
