"""Scores of judged benchmarks: MT-Bench and AlpacaEval, for a recipe's models or from a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dominie.display import Display
from dominie.evaluation.annotations import read_annotations, read_difficulty, summarise


def annotated_win_rates(path: Path, difficulty: Path | None, display: Display) -> dict[str, Any]:
    """Win rates of an AlpacaEval annotation file, in percent, said in words as well.

    Args:
        path: annotations as upstream publishes them, a JSON array.
        difficulty: upstream's `df_gamed.csv` or `instruction_difficulty.csv`.
        display: where the words go.
    """
    rows = read_annotations(path)
    known = None if difficulty is None else read_difficulty(difficulty)
    summary = summarise(rows, known, where=str(path))
    told = summary.percent()
    names = {key: rows[0].get(key) for key in ("generator_2", "generator_1", "annotator")}
    told |= {"model": names["generator_2"], "baseline": names["generator_1"]}
    told["annotator"] = names["annotator"]
    display.line(f"{told['model'] or path.name} against {told['baseline'] or 'the baseline'}")
    display.line(
        f"  win rate           {told['win_rate']:.2f} % ± {told['standard_error']:.2f} "
        f"(n = {told['n']}; {told['n_wins']} won, {told['n_wins_base']} lost, "
        f"{told['n_draws']} drawn; {told['n_excluded']} without a preference)"
    )
    if summary.controlled is not None:
        display.line(
            f"  at equal length    {told['length_controlled_win_rate']:.2f} % "
            f"± {told['length_controlled_standard_error']:.2f} ({summary.control})"
        )
    if summary.longer is not None:
        display.line(f"  the longer answer won {told['longer_answer_wins']:.1f} % of decided pairs")
    return told
