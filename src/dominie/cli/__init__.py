"""The verbs of the command line. Nothing heavy is imported until one of them runs."""

from dominie.cli.app import app
from dominie.cli.entry import main

from dominie.cli import before, running, results  # isort: skip - the order of `dominie --help`

__all__ = ["app", "before", "main", "results", "running"]
