"""Servers for generators."""

from fault_server import serve

__all__ = ["serve"]
