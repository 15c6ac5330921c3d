"""From a benchmark's settings to the benchmark itself, its files read and checked."""

from __future__ import annotations

from dominie.judge.alpaca_eval import AlpacaEval, AlpacaEvalExam
from dominie.judge.benchmark import Benchmark
from dominie.judge.mt_bench import MtBench, MtBenchExam


def exam(settings: MtBench | AlpacaEval) -> Benchmark:
    """The benchmark of these settings.

    Raises:
        InputError: a file is missing or malformed.
    """
    if isinstance(settings, AlpacaEval):
        return AlpacaEvalExam(settings)
    return MtBenchExam(settings)
