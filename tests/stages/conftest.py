"""Servers for stages."""

from fault_server import serve

__all__ = ["serve"]
