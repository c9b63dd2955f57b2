"""The words of a caption as classes of its picture."""

from __future__ import annotations

import jax.numpy as jnp

from mmjax.typing import Array, Float, Int


def word_loss(
    shares: Float[Array, "b i v"],
    tokens: Int[Array, "b t"],
    weights: Float[Array, "b t"],
    image: Int[Array, "b t"],
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Cross entropy of a caption's tokens under the distribution that its image gives, in nats.

    The objective of SuperClass (Huang et al., "Classification Done Right for Vision-Language
    Pre-Training", 2024): the order of the words does not count, and each weighs by its inverse
    document frequency, so that those which every caption has ("a", the end token) weigh nothing.
    Frequencies are those of the batch.

    Args:
      shares: logarithm of the distribution over the vocabulary of each image.
      tokens: the stream.
      weights: of the prediction of each token; above 0 in captions.
      image: whose words they are, -1 for none.

    Returns:
      Sums over the words: of weight * loss, and of weight.
    """
    counts = (weights > 0) & (image >= 0)
    owners = image[:, :, None] == jnp.arange(shares.shape[1])
    captions = jnp.sum(jnp.any(owners & counts[:, :, None], axis=1))
    vocabulary = shares.shape[-1]
    where = jnp.where(counts, tokens, vocabulary)
    found = jnp.zeros(vocabulary).at[where].add(1.0, mode="drop")
    rarity = jnp.log(jnp.maximum(captions, 1) / jnp.maximum(found, 1))[tokens]
    weights = jnp.where(counts, jnp.maximum(rarity, 0.0), 0.0)
    rows = jnp.arange(tokens.shape[0])[:, None]
    loss = -shares[rows, jnp.maximum(image, 0), tokens]
    return jnp.sum(jnp.where(counts, weights * loss, 0.0)), jnp.sum(weights)
