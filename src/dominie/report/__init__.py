"""Run folders as something to look at: one HTML page, and a table for the terminal.

Reads files only; neither torch nor a model is needed to report on a run.
"""

from __future__ import annotations

from dominie.report.page import write_report
from dominie.report.terminal import results_table

__all__ = ["results_table", "write_report"]
