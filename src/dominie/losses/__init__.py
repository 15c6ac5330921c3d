"""The losses of a student, without logits and without attention maps. Knows torch only."""

from dominie.losses.attention import attention_divergence
from dominie.losses.attention_rows import Projections
from dominie.losses.heads import Head
from dominie.losses.targets import SparseTarget
from dominie.losses.vocabulary import VocabularyLosses, prediction_divergence, vocabulary_losses

__all__ = [
    "Head",
    "Projections",
    "SparseTarget",
    "VocabularyLosses",
    "attention_divergence",
    "prediction_divergence",
    "vocabulary_losses",
]
