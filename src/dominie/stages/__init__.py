"""The stages of a recipe, one file a kind; runs them in order, fills caches, evaluates models."""
