"""A recipe's run: its folder, what is known before it begins, its stages and its scores."""
