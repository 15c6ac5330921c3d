"""Sweeps: one recipe run under many values and seeds, in parallel, into one table."""

from dominie.sweep.cells import Cell, grid, seeds_of
from dominie.sweep.runner import run_cells
from dominie.sweep.selection import best_cells, check_selection
from dominie.sweep.table import Row, rows_of, write_csv

__all__ = [
    "Cell",
    "Row",
    "best_cells",
    "check_selection",
    "grid",
    "rows_of",
    "run_cells",
    "seeds_of",
    "write_csv",
]
