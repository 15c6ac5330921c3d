"""The losses: what a student is trained on."""

from dominie.losses.heads import Head
from dominie.losses.targets import SparseTarget
from dominie.losses.vocabulary import VocabularyLosses, prediction_divergence, vocabulary_losses

__all__ = [
    "Head",
    "SparseTarget",
    "VocabularyLosses",
    "prediction_divergence",
    "vocabulary_losses",
]
