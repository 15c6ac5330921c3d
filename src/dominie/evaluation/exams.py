"""From a benchmark's settings to the benchmark itself, its files read and checked."""

from __future__ import annotations

from dominie.evaluation.alpaca_eval import AlpacaEval, AlpacaEvalExam
from dominie.evaluation.benchmarks import Exam
from dominie.evaluation.mt_bench import MtBench, MtBenchExam


def exam(settings: MtBench | AlpacaEval) -> Exam:
    """The benchmark of these settings.

    Raises:
        InputError: a file is missing or malformed.
    """
    if isinstance(settings, AlpacaEval):
        return AlpacaEvalExam(settings)
    return MtBenchExam(settings)
