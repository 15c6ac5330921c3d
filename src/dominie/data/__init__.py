"""Conversations: read, split, rendered, tokenised once, mixed and packed into batches. Knows no model."""
