"""Win rates at equal length without a difficulty file, beside AlpacaEval's published ones.

Reads the annotation files and leaderboards of a checkout of tatsu-lab/alpaca_eval. Every file is
fitted, whether its lengths overlap or not; `away` is how far equal length lies from the mean of
what was compared, in standard deviations, and `given` says whether dominie prints the figure. Files
without a published figure at equal length, and the baseline against itself, are left out.

    python benchmarks/length_control.py CHECKOUT [--json]
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import statistics
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dominie.judge.annotations import read_annotations
from dominie.judge.length_control import length_controlled, win_rate, wins
from dominie.judge.length_overlap import distance_of_equal, no_overlap

if TYPE_CHECKING:
    from collections.abc import Iterator

BOARDS = {
    1: ("data_AlpacaEval", "alpaca_eval_gpt4"),
    2: ("data_AlpacaEval_2", "weighted_alpaca_eval_gpt4_turbo"),
}
#: Of the bands of distances in the second table.
EDGES = (-1.0, 0.5, 1.0, 1.25, 1.5, 2.0, math.inf)


def rows(checkout: Path) -> Iterator[dict[str, Any]]:
    """One row for each annotation file with a published rate at equal length."""
    boards = checkout / "src" / "alpaca_eval" / "leaderboards"
    for version, (folder, judge) in BOARDS.items():
        with (boards / folder / f"{judge}_leaderboard.csv").open(encoding="utf-8") as file:
            published = {
                row[""]: float(row["length_controlled_winrate"])
                for row in csv.DictReader(file)
                if row.get("length_controlled_winrate")
            }
        for path in sorted(checkout.glob(f"results/*/{judge}/annotations.json")):
            model = path.parts[-3]
            found = read_annotations(path) if model in published else []
            if not found or found[0].get("generator_1") == found[0].get("generator_2"):
                continue
            preferences = [row["preference"] for row in found]
            lengths = [(len(row["output_1"]), len(row["output_2"])) for row in found]
            rate, values = win_rate(preferences), wins(preferences)
            assert rate is not None, "published files have preferences"
            difference = np.array([m - b for b, m in lengths], dtype=np.float64)
            controlled = length_controlled(values, lengths)
            yield {
                "version": version,
                "file": model,
                "win_rate": 100 * rate.win_rate,
                "no_difficulty": 100 * controlled.win_rate,
                "error": 100 * controlled.standard_error,
                "published": published[model],
                "gap": 100 * controlled.win_rate - published[model],
                "away": distance_of_equal(difference),
                "given": no_overlap(values, lengths) is None and controlled.bounded,
            }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkout", type=Path, metavar="CHECKOUT")
    parser.add_argument("--json", action="store_true", help="one JSON object a row")
    options = parser.parse_args()
    found = []
    for row in rows(options.checkout):
        found.append(row)
        if options.json:
            print(json.dumps(row), flush=True)
    if options.json:
        return
    print("| version | file | win rate | no difficulty | published | gap | away | given |")
    print("|---|---|---|---|---|---|---|---|")
    for row in sorted(found, key=lambda row: row["away"]):
        print(
            f"| {row['version']} | {row['file']} | {row['win_rate']:.2f} | "
            f"{row['no_difficulty']:.2f} ± {row['error']:.2f} | {row['published']:.2f} | "
            f"{row['gap']:+.2f} | {row['away']:.2f} | {'yes' if row['given'] else 'no'} |"
        )
    print("\n| away | files | gaps | median size of a gap | given |")
    print("|---|---|---|---|---|")
    for low, high in pairwise(EDGES):
        band = [row for row in found if low < row["away"] <= high]
        gaps = [row["gap"] for row in band]
        if gaps:
            print(
                f"| to {high:g} | {len(gaps)} | {min(gaps):+.2f} to {max(gaps):+.2f} | "
                f"{statistics.median(map(abs, gaps)):.2f} | {sum(row['given'] for row in band)} |"
            )


if __name__ == "__main__":
    main()
