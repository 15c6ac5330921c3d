"""The report of a run: one HTML page, and tables for the terminal. Reads files only.

Neither torch nor a model is needed to report on a run.
"""

from __future__ import annotations

from dominie.report.compare import compare_runs
from dominie.report.page import write_comparison, write_report
from dominie.report.terminal import comparison_table, results_table

__all__ = ["compare_runs", "comparison_table", "results_table", "write_comparison", "write_report"]
