"""Judged benchmarks: MT-Bench and AlpacaEval, their judges, files and statistics."""
