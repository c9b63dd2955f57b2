"""Losses. Each returns (numerator, denominator), so that sums over batches stay exact."""

from mmjax.losses.classification import softmax_cross_entropy
from mmjax.losses.contrastive import (
    ring_sigmoid_contrastive,
    ring_softmax_contrastive,
    sigmoid_contrastive,
    softmax_contrastive,
)
from mmjax.losses.language_modelling import next_token_loss
from mmjax.losses.words import word_loss

__all__ = [
    "next_token_loss",
    "ring_sigmoid_contrastive",
    "ring_softmax_contrastive",
    "sigmoid_contrastive",
    "softmax_contrastive",
    "softmax_cross_entropy",
    "word_loss",
]
