"""The stages of a recipe: how each kind is prepared and run, and how models are evaluated."""
