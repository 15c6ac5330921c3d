"""Scores models: answers, comparisons with a teacher, and honest uncertainty."""
