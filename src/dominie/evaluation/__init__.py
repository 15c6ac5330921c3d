"""Tasks, metrics and statistics: scores models by their answers or by likelihood."""
