"""The verbs of the command line. Nothing heavy is imported until one of them runs."""

from dominie.cli import commands, result_commands
from dominie.cli.main import app, main

__all__ = ["app", "commands", "main", "result_commands"]
