"""Trains: the one trainer on transformers.Trainer, its settings, metrics and checkpoints."""
