"""The command line: its commands and options, what they print, exit statuses."""

from dominie.cli import commands as before
from dominie.cli import commands as running
from dominie.cli import result_commands as results
from dominie.cli.app import app
from dominie.cli.entry import main

__all__ = ["app", "before", "main", "results", "running"]
