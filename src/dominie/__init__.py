"""dominie: train small language models from large ones, align them to a domain, forget nothing."""

__version__ = "0.1.0"
