"""Plan before spending: what a recipe's stages need in parameters, memory, time and money."""
