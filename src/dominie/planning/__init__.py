"""Plans a recipe before it runs: parameters, memory, time and money of its stages."""
