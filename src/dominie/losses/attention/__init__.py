"""Attention distillation without attention maps: the divergence of rows from query and key."""

from dominie.losses.attention.api import AttentionTerm, attention_divergence, divergence_of_terms
from dominie.losses.attention.projections import Projections
from dominie.losses.attention.visibility import Visibility

__all__ = [
    "AttentionTerm",
    "Projections",
    "Visibility",
    "attention_divergence",
    "divergence_of_terms",
]
