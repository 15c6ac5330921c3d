"""Servers for judged benchmarks."""

import sys
from pathlib import Path

from fault_server import serve

sys.path.insert(0, str(Path(__file__).parent))

__all__ = ["serve"]
