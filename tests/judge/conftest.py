"""Servers for judged benchmarks."""

from fault_server import serve

__all__ = ["serve"]
