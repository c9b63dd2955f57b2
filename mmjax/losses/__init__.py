"""Losses. Each returns (numerator, denominator), so that sums over batches stay exact."""

from mmjax.losses.classification import softmax_cross_entropy
from mmjax.losses.contrastive import (
    ring_sigmoid_contrastive,
    ring_softmax_contrastive,
    sigmoid_contrastive,
    softmax_contrastive,
)
from mmjax.losses.language_modelling import next_token_loss, next_token_losses
from mmjax.losses.reconstruction import (
    absolute_error,
    hinge_generator,
    hinge_made,
    hinge_real,
    perceptual_distance,
    squared_error,
)
from mmjax.losses.words import word_loss

__all__ = [
    "absolute_error",
    "hinge_generator",
    "hinge_made",
    "hinge_real",
    "next_token_loss",
    "next_token_losses",
    "perceptual_distance",
    "ring_sigmoid_contrastive",
    "ring_softmax_contrastive",
    "sigmoid_contrastive",
    "softmax_contrastive",
    "softmax_cross_entropy",
    "squared_error",
    "word_loss",
]
