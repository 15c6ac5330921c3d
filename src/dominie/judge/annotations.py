"""AlpacaEval's annotation files: who was preferred on each instruction, and what follows."""

from __future__ import annotations

import csv
import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from dominie.core.errors import InputError
from dominie.generation.thoughts import part_thoughts
from dominie.judge.benchmark import failed_answers
from dominie.judge.length_control import (
    Gamed,
    LengthControlled,
    WinRate,
    length_controlled,
    longer_wins,
    win_rate,
    wins,
)
from dominie.judge.length_overlap import no_overlap
from dominie.judge.published_files import by_unique, read_objects, unreadable

_GAMED_COLUMNS = {"preference", "std_delta_len", "not_gamed_baseline"}


@dataclass(frozen=True)
class Difficulty:
    """How hard instructions are for models, as the authors of AlpacaEval publish it.

    Attributes:
        of: difficulty by an instruction's place in the evaluation set.
        gamed: preferences of baselines instructed to game the length, None without them.
    """

    of: dict[int, float]
    gamed: Gamed | None


@dataclass(frozen=True)
class Summary:
    """Figures of an annotation file. Fractions, not percent.

    Attributes:
        wins: the plain win rate.
        controlled: at equal length; None if nothing is known of it.
        control: how length was controlled for, or why there is no rate at equal length.
        longer: share of decided pairs that the longer answer won.
        length: mean characters of the model's answers.
        notes: what a person should know of the file.
    """

    wins: WinRate
    controlled: LengthControlled | None
    control: str
    longer: float | None
    length: float | None
    notes: tuple[str, ...] = ()

    def percent(self) -> dict[str, Any]:
        """Return figures as `--json` prints them: rates in percent."""
        rates = dataclasses.asdict(self.wins)
        found: dict[str, Any] = {
            "win_rate": 100 * rates["win_rate"],
            "standard_error": 100 * rates["standard_error"],
            "n": rates["n"],
            "n_excluded": rates["excluded"],
            "n_wins": rates["wins"],
            "n_wins_base": rates["losses"],
            "n_draws": rates["draws"],
            "discrete_win_rate": 100 * rates["discrete_win_rate"],
            "length_control": self.control,
        }
        if self.controlled is not None:
            found |= {
                "length_controlled_win_rate": 100 * self.controlled.win_rate,
                "length_controlled_standard_error": 100 * self.controlled.standard_error,
            }
            if self.controlled.spread_error > 1e-12:
                found["lc_standard_error"] = 100 * self.controlled.spread_error  # upstream's
        if self.longer is not None:
            found["longer_answer_wins"] = 100 * self.longer
        if self.length is not None:
            found["avg_length"] = self.length
        if self.notes:
            found["warnings"] = list(self.notes)
        return found


def read_annotations(path: Path) -> list[dict[str, Any]]:
    """Return the rows of an annotation file.

    Raises:
        InputError: it cannot be read, holds no preferences, those of several models or annotators,
            or an instruction twice.
    """
    placed = read_objects(path, what="annotations")
    for where, row in placed:
        if "preference" not in row:
            raise InputError(
                "a row without a preference",
                where=where,
                expected="1 for the baseline, 2 for the model, or between; null for none",
                found=f"keys {', '.join(row)}",
            )
    rows = [row for _, row in placed]
    for side in ("generator_1", "generator_2"):
        names = {str(row.get(side, "none named")) for row in rows}
        if len(names) > 1:
            raise InputError(
                f"annotations of several models under {side}",
                where=str(path),
                found=", ".join(sorted(names)[:5]),
                do="split the file: one model against one baseline",
            )
    annotators = {str(row.get("annotator", "none named")) for row in rows}
    if len(annotators) > 1:
        raise InputError(
            "annotations of several annotators",
            where=str(path),
            found=", ".join(sorted(annotators)[:5]),
            do="split the file: the verdicts of one annotator",
        )
    named = [(where, row["instruction"]) for where, row in placed if "instruction" in row]
    by_unique(named, str, what="instruction")
    return rows


def read_difficulty(path: Path) -> Difficulty:
    """Read the authors' `df_gamed.csv`, or their `instruction_difficulty.csv`.

    The first holds what regularises the fit as well, the second the difficulties alone.

    Raises:
        InputError: it is neither.
    """
    rows = _read_csv(path, what="instruction difficulty")
    columns = set(rows[0][1])
    index = "index" if "index" in columns else next(iter(rows[0][1]))
    if "instruction_difficulty" not in columns:
        raise InputError(
            "no difficulty of instructions",
            where=str(path),
            expected="the columns index and instruction_difficulty",
            found=", ".join(map(str, columns)),
        )
    of: dict[int, float] = {}
    for where, row in rows:
        of.setdefault(
            int(_number_field(row, index, where=where)),
            _number_field(row, "instruction_difficulty", where=where),
        )
    if not columns >= _GAMED_COLUMNS:
        return Difficulty(of, None)
    kept = [
        (where, row)
        for where, row in rows
        if row["not_gamed_baseline"].strip().lower() not in ("true", "1")
        and row["preference"].strip().lower() not in ("", "nan")
    ]
    preference, difference, difficulty = (
        np.array([_number_field(row, name, where=where) for where, row in kept])
        for name in ("preference", "std_delta_len", "instruction_difficulty")
    )
    if len(kept) and not (preference.min() >= 0 and preference.max() <= 1):
        raise InputError("preferences of gamed baselines are from 0 to 1", where=str(path))
    return Difficulty(of, Gamed(preference, difference, difficulty))


def summarise(
    rows: Sequence[dict[str, Any]], difficulty: Difficulty | None = None, *, where: str
) -> Summary:
    """Return the win rate, plain and length-controlled, of rows in the evaluation set's order.

    Args:
        rows: with `preference`, and `output_1` and `output_2` for the lengths.
        difficulty: None leaves it out of the model, which is then labelled so.
        where: the file, for messages.

    Raises:
        InputError: no row has a preference, or an instruction has no difficulty.
    """
    preferences = [row["preference"] for row in rows]
    rate = win_rate(preferences)
    if rate is None:
        raise InputError("no row has a preference from 1 to 2", where=where)
    if not all(isinstance(row.get(f"output_{i}"), str) for row in rows for i in (1, 2)):
        return Summary(rate, None, _without_outputs(rows), None, None, _failed(rows))
    values = wins(preferences)
    lengths = [(len(row["output_1"]), len(row["output_2"])) for row in rows]
    controlled, label = _controlled(rows, values, lengths, difficulty, where)
    return Summary(
        wins=rate,
        controlled=controlled,
        control=label,
        longer=longer_wins(lengths, values),
        length=fmean(model for _, model in lengths),
        notes=_failed(rows),
    )


def _failed(rows: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """Return warnings of outputs that are none, or hold thoughts, for each side."""
    sides = {"output_1": "baseline outputs", "output_2": "outputs of the model"}
    outputs = (
        ({f"row {i}": [row[key]] for i, row in enumerate(rows, 1) if key in row}, what)
        for key, what in sides.items()
    )
    notes = [failed_answers(*pair) for pair in outputs]
    for key, what in sides.items():
        texts = [row[key] for row in rows if isinstance(row.get(key), str)]
        if count := sum(bool(part_thoughts(text).thoughts) for text in texts):
            notes.append(
                f"{count} of {len(rows)} {what} hold thoughts: they were judged, and their "
                "length counts"
            )
    return tuple(note for note in notes if note is not None)


def _without_outputs(rows: Sequence[Mapping[str, Any]]) -> str:
    lacking = [
        i
        for i, row in enumerate(rows, 1)
        if not all(isinstance(row.get(key), str) for key in ("output_1", "output_2"))
    ]
    if len(lacking) == len(rows):
        return "none: no row has both outputs as texts"
    return f"none: {len(lacking)} of {len(rows)} rows lack an output, row {lacking[0]} the first"


def _controlled(
    rows: Sequence[dict[str, Any]],
    values: Sequence[float | None],
    lengths: Sequence[tuple[int, int]],
    difficulty: Difficulty | None,
    where: str,
) -> tuple[LengthControlled | None, str]:
    if rows[0].get("generator_1") is not None and (
        rows[0]["generator_1"] == rows[0].get("generator_2")
    ):
        return LengthControlled(0.5, 0.0, 0.0, 0.0, 0.0), "the baseline against itself"
    gamed, known, label = None, None, "no difficulty"
    if difficulty is not None:
        known, gamed = _known_difficulties(rows, difficulty, where), difficulty.gamed
        label = "upstream" if gamed else "difficulty, not regularised"
    # Upstream's gamed baselines are longer as well as shorter: with them lengths overlap.
    if gamed is None and (why := no_overlap(values, lengths)) is not None:
        return None, f"none: {why}; with AlpacaEval's df_gamed.csv there is one"
    controlled = length_controlled(values, lengths, difficulty=known, gamed=gamed)
    if controlled.without_terms and abs(fmean(p for p in values if p is not None) - 0.5) > 1e-9:
        return None, "none: the fit keeps no term, which would be 50 % whatever the win rate is"
    if not controlled.bounded:
        return None, "none: its 95 % interval would reach 50 points and more on each side"
    return controlled, label


def _known_difficulties(
    rows: Sequence[dict[str, Any]], difficulty: Difficulty, where: str
) -> list[float]:
    found = [difficulty.of.get(row.get("index", i)) for i, row in enumerate(rows)]
    known = [value for value in found if value is not None]
    if len(known) < len(found):
        raise InputError(
            "instructions without a difficulty",
            where=where,
            found=f"{len(found) - len(known)} of {len(found)}, row {found.index(None)} the first",
            do="use the difficulty file of this evaluation set, or leave it out",
        )
    return known


def _read_csv(path: Path, *, what: str) -> list[tuple[str, dict[str, str]]]:
    """Return the rows of a CSV file by column, each with its place."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            found = [(f"{path}:{reader.line_num}", dict(row)) for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise unreadable(path, what, error) from None
    if not found:
        raise InputError(f"the file of {what} is empty", where=str(path))
    return found


def _number_field(row: Mapping[str, Any], name: str, *, where: str) -> float:
    """Return a field that has to be a finite number, or to spell one."""
    try:
        value = float(row[name])
        if math.isfinite(value):
            return value
    except (KeyError, TypeError, ValueError):
        pass
    raise InputError(f"no number under {name!r}", where=where, found=repr(row.get(name)))
