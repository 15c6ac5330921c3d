"""Conversations: read, split, rendered, tokenised, mixed, packed into batches. Knows no model."""
