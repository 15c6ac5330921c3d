"""The one trainer, on transformers.Trainer: settings, batches, loss, metrics, checkpoints."""
