"""`dominie check`: all that can be known of a recipe before anything is spent."""

from dominie.checking.check import Checked, check_recipe

__all__ = ["Checked", "check_recipe"]
