"""Conversations: read, split, tokenised once, mixed and laid out as batches."""
