"""What `benchmarks/gpu.sh` measured, beside the goals, in at most 11,000 characters.

    python benchmarks/parts/gpu_summary.py FOLDER [--write]

reads the rows in a folder, whatever there is of them; of two rows of one thing the later counts.
``--write`` writes it to a dated file of `benchmarks/results`, too.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

BENCHMARKS = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(BENCHMARKS))
from _table import table  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

Row = dict[str, Any]
#: What may be printed where little is kept of it.
MOST = 11_000
#: The columns that are shown of each benchmark, those that tell rows apart first.
KEYS = {
    "geometry": ("part", "job", "method"),
    "attention": ("part", "length", "method", "divergence_per_row", "backend"),
    "prediction": ("part", "tokens", "vocabulary", "method", "supervised"),
    "real_run": ("model",),
}
SHOWN = {
    "geometry": ("layers", "tokens_per_second", "step_seconds", "to_plain", "mfu", "of_bound",
                 "of_matrix_speed", "with_models_gb", "full_depth_tokens_per_second", "loss"),
    "attention": ("seconds", "to_logits", "maps_to_it", "milliseconds", "over_floor_6u", "peak_gb",
                  "query_error_percent", "key_error_percent"),
    "prediction": ("seconds", "ratio", "peak_mb", "all_positions_seconds"),
    "real_run": ("attribute_f1", "exact_match", "general_kl", "general_agreement", "general_loss",
                 "steps", "seconds"),
}  # fmt: skip


class Goal(NamedTuple):
    """What is to be reached, and how it follows from the rows.

    Attributes:
        text: as in benchmarks/README.md.
        limit: of the figure.
        least: whether the figure is to be at least so much, not at most.
        figure: from the rows; None where they are missing.
    """

    text: str
    limit: float
    least: bool
    figure: Callable[[Rows], float | None]


class Rows:
    """The rows of all benchmarks that were run."""

    def __init__(self, folder: Path) -> None:
        self.by_name = {name: list(rows_of(folder / f"{name}.jsonl", KEYS[name])) for name in KEYS}
        for row in self.by_name["geometry"]:  # plain code of a call of its own
            if row.get("method") == "plain" and row.get("to_plain") is None:
                job = {"part": row.get("part"), "job": row.get("job"), "method": "dominie"}
                ours = self._one("geometry", **job).get("tokens_per_second")
                rate = divided(ours, row.get("tokens_per_second"))
                row["to_plain"] = rate and round(rate, 2)

    def geometry(self, job: str) -> Row:
        """The row of dominie's job at the goals' length."""
        return self._one("geometry", part="L = 2048", job=job, method="dominie")

    def share_of_bound(self, job: str) -> float | None:
        """The best share of the FLOP bound, in percent, of a job with fused layers or without."""
        names = (job, f"{job}, fused", f"{job}, fused, wider")
        shares = [percent(self.geometry(name).get("of_bound")) for name in names]
        return max((share for share in shares if share is not None), default=None)

    def slower(self, job: str, other: str) -> float | None:
        """Time of a job over another's."""
        return divided(*(self.geometry(each).get("tokens_per_second") for each in (other, job)))

    def attention(self, length: int) -> float | None:
        """A whole step with the attention term over one on logits alone."""
        return self._one("attention", part="step", length=length, method="triton").get("to_logits")

    def prediction(self, column: str, *, to: str, tokens: int) -> float | None:
        """A column of dominie's kernel over another method's."""
        size = {"part": "loss", "tokens": tokens, "vocabulary": 128256}
        ours, theirs = (
            self._one("prediction", **size, method=method).get(column)
            for method in ("dominie-triton", to)
        )
        return divided(ours, theirs)

    def _one(self, name: str, **wanted: Any) -> Row:
        rows = self.by_name[name]
        return next((r for r in rows if all(r.get(k) == v for k, v in wanted.items())), {})


GOALS = (
    Goal("KD + attention, L = 2048: share of the FLOP bound, %", 50, True,
         lambda rows: rows.share_of_bound("KD + attention")),
    Goal("KD + attention, L = 2048: time over logits alone", 1.10, False,
         lambda rows: rows.slower("KD + attention", "KD")),
    Goal("attention, L = 4096: time of a step over logits alone", 1.15, False,
         lambda rows: rows.attention(4096)),
    Goal("attention, L = 8192: time of a step over logits alone", 1.25, False,
         lambda rows: rows.attention(8192)),
    Goal("DAE online: time over one teacher", 1.05, False,
         lambda rows: rows.slower("DAE online", "one teacher")),
    Goal("DAE from cache: time over next-token tuning", 1.1, False,
         lambda rows: rows.slower("DAE from cache", "next token")),
    Goal("vocabulary loss, 8192 tokens: time over Liger's", 1.0, False,
         lambda rows: rows.prediction("seconds", to="liger", tokens=8192)),
    Goal("vocabulary loss, 8192 tokens: memory over Liger's", 1.0, False,
         lambda rows: rows.prediction("peak_mb", to="liger", tokens=8192)),
    Goal("vocabulary loss, 1024 tokens: time over materialised", 1.0, False,
         lambda rows: rows.prediction("seconds", to="materialised", tokens=1024)),
    Goal("packed rows: tokens a second over those of full rows", 0.95, True,
         lambda rows: divided(1.0, rows.slower("KD + attention, packed", "KD + attention"))),
)  # fmt: skip


def divided(one: float | None, other: float | None) -> float | None:
    """A ratio, None where a part of it is missing."""
    return one / other if one is not None and other else None


def percent(text: str | None) -> float | None:
    """The number in "12.3 %"."""
    return float(text.split()[0]) if text else None


def rows_of(file: Path, keys: tuple[str, ...]) -> Iterator[Row]:
    """The rows of a file in their order, of equal ones the last; lines cut off are left out."""
    found: dict[tuple[Any, ...], Row] = {}
    text = file.read_text(encoding="utf-8", errors="replace") if file.exists() else ""
    for line in text.splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            found[tuple(row.get(key) for key in keys)] = row
    yield from found.values()


def goals(rows: Rows) -> list[Mapping[str, object]]:
    """The goals as rows of a table."""
    lines = []
    for goal in GOALS:
        found = goal.figure(rows)
        met = found is not None and (found >= goal.limit if goal.least else found <= goal.limit)
        lines.append(
            {
                "goal": goal.text,
                "limit": f"{'≥' if goal.least else '≤'} {goal.limit:g}",
                "measured": "–" if found is None else f"{found:.3g}",
                "met": "–" if found is None else "yes" if met else "no",
            }
        )
    return lines


def summary(folder: Path) -> str:
    """The tables of a folder, what is wrong first, cut at `MOST` characters."""
    rows = Rows(folder)
    parts = [machine(folder), table(goals(rows))]
    tests = folder / "tests.txt"
    if tests.exists():
        lines = tests.read_text(encoding="utf-8", errors="replace").split("\n")
        told = [line[:160] for line in lines if line.startswith(("FAILED", "ERROR"))]
        parts.append("\n".join(["tests: " + (lines[-2] if len(lines) > 1 else "none"), *told[:12]]))
    for name, found in rows.by_name.items():
        wrong = [f"wrong: {name}, {_named(row, name)}: {row['wrong']}" for row in found
                 if row.get("wrong")]  # fmt: skip
        parts += ["\n".join(wrong)[:1500]] if wrong else []
    for name, found in rows.by_name.items():
        for part in dict.fromkeys(row.get("part") for row in found):
            own = [row for row in found if row.get("part") == part]
            columns = (*KEYS[name], *SHOWN[name], "note")
            told = [{c: row.get(c) for c in columns if c != "part"} for row in own]
            parts.append(f"## {name}{f', {part}' if part else ''}\n\n{table(told)}")
    text = "\n\n".join(parts)
    return text if len(text) <= MOST else text[: MOST - 40].rsplit("\n", 1)[0] + "\n… cut here"


def machine(folder: Path) -> str:
    """On what it was measured, and when."""
    file = folder / "machine.txt"
    return file.read_text(encoding="utf-8").strip() if file.exists() else "an unknown machine"


def _named(row: Row, name: str) -> str:
    return ", ".join(str(row[key]) for key in KEYS[name] if row.get(key) is not None)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--write", action="store_true", help="to a dated file, too")
    options = parser.parse_args()
    text = summary(options.folder)
    print(text)
    if options.write:
        today = datetime.datetime.now(tz=datetime.UTC).date().isoformat()
        path = BENCHMARKS / "results" / f"gpu-{today}.md"
        path.write_text(f"# On a GPU, {today}\n\n`bash benchmarks/gpu.sh` on {text}\n")


if __name__ == "__main__":
    main()
