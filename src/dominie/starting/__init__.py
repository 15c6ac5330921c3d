"""`dominie init`: a folder to start from, with a commented recipe and data that it runs on."""

from dominie.starting.folder import TEMPLATES, start

__all__ = ["TEMPLATES", "start"]
