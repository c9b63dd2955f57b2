"""Contrastive losses between unit-norm image and text features, exact over a mesh.

Each loss comes twice, with the same value and the same gradients:

* `softmax_contrastive`, `sigmoid_contrastive`: a few lines over the whole [B, B] matrix. On a
  sharded batch every device holds a [B / n, B] stripe of it, growing with the number of devices.
* `ring_*`: the batch stays where it is and blocks of text features travel from device to device, so
  a device never holds more than one [B / n, B / n] block. The gradient is written by hand: the
  forward pass leaves only the gradients of the features ([B / n, D]) behind, whereas
  differentiating through the loop would keep every block.

All of them return (numerator, denominator); the loss is their ratio. So that losses of several
batches can be added up exactly, the denominator is the number of pairs.

Sources: Radford et al. 2021 (CLIP, arXiv:2103.00020, figure 3) and Zhai et al. 2023 (SigLIP,
arXiv:2303.15343, algorithm 1 and the chunked implementation of its section 3.3).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AbstractMesh, Mesh
from jax.sharding import PartitionSpec as P

from mmjax.registry import UnknownNameError, nearest
from mmjax.typing import Array, Float, PyTree

Scalar = Float[Array, ""]


def _dot(a: Array, b: Array, contract: tuple[int, int]) -> Array:
    """float32 products: TPUs and GPUs would round the inputs to bfloat16 or TF32 otherwise."""
    dims = (((contract[0],), (contract[1],)), ((), ()))
    return lax.dot_general(a, b, dims, precision=lax.Precision.HIGHEST)


def _float32(*arrays: Array) -> tuple[Array, ...]:
    return tuple(jnp.asarray(array, jnp.float32) for array in arrays)


def _check_pairs(image: Array, text: Array) -> None:
    if image.ndim != 2 or image.shape != text.shape:
        raise ValueError(
            f"A contrastive loss takes image and text features of one shape [B, D], row i of one "
            f"belonging to row i of the other; got {image.shape} and {text.shape}."
        )


# The formulas, over the whole matrix.


def softmax_contrastive(
    image: Float[Array, "b d"], text: Float[Array, "b d"], scale: Float[Array, ""]
) -> tuple[Scalar, Scalar]:
    """CLIP's loss: the mean of the cross entropies image -> text and text -> image.

    Args:
      image, text: unit-norm features; row i of one belongs to row i of the other.
      scale: factor on the cosine similarities (1 / temperature, not its logarithm).

    Returns:
      (sum over pairs, number of pairs), float32 scalars.

    Raises:
      ValueError: if the features differ in shape.
    """
    _check_pairs(image, text)
    image, text, scale = _float32(image, text, scale)
    logits = scale * _dot(image, text, (1, 1))
    matching = jnp.diagonal(logits)
    to_text = jax.nn.logsumexp(logits, axis=1) - matching
    to_image = jax.nn.logsumexp(logits, axis=0) - matching
    return 0.5 * jnp.sum(to_text + to_image), jnp.float32(len(image))


def sigmoid_contrastive(
    image: Float[Array, "b d"],
    text: Float[Array, "b d"],
    scale: Float[Array, ""],
    bias: Float[Array, ""],
) -> tuple[Scalar, Scalar]:
    """SigLIP's loss: every one of the B * B pairs is a binary classification.

    Args:
      image, text: unit-norm features; row i of one belongs to row i of the other.
      scale: factor on the cosine similarities (1 / temperature, not its logarithm).
      bias: added to the scaled similarities.

    Returns:
      (sum over all B * B pairs, B), float32 scalars: like the paper, the loss is per image.

    Raises:
      ValueError: if the features differ in shape.
    """
    _check_pairs(image, text)
    image, text, scale, bias = _float32(image, text, scale, bias)
    logits = scale * _dot(image, text, (1, 1)) + bias
    signs = 2.0 * jnp.eye(len(image)) - 1.0
    return -jnp.sum(jax.nn.log_sigmoid(signs * logits)), jnp.float32(len(image))


# The ring.


def _travel(axes: tuple[str, ...], size: int, tree: PyTree) -> PyTree:
    """Every device hands `tree` to the next one and receives that of the previous one."""
    steps = [(i, (i + 1) % size) for i in range(size)]
    return jax.tree.map(lambda x: lax.ppermute(x, axes, steps), tree)


def _ring(
    visit: Callable, axes: tuple[str, ...], size: int, cargo: PyTree, kept: PyTree, sums: PyTree
) -> tuple[PyTree, PyTree]:
    """Show every device's `cargo` to every device.

    Args:
      visit: `(own, cargo, kept, sums) -> (kept, sums)`, called with the cargo of each device in
        turn; `own` is true when it is this device's own.
      cargo: read-only arrays that travel.
      kept: accumulators that stay on the device.
      sums: accumulators that travel with the cargo they belong to.

    Returns:
      `kept`, and `sums` back on the device whose cargo they belong to.
    """

    def step(k, state):
        cargo, kept, sums = state
        # Neither transfer waits for this step's arithmetic, so both can run beside it: the next
        # cargo sets out now, and the sums arrive as they were before this visit.
        upcoming = _travel(axes, size, cargo)
        sums = _travel(axes, size, sums)
        kept, sums = visit(k == 0, cargo, kept, sums)
        return upcoming, kept, sums

    # The accumulators' initial values are constants; inside shard_map the loop must be told that
    # they will differ from device to device.
    kept, sums = jax.tree.map(lambda x: lax.pcast(x, axes, to="varying"), (kept, sums))
    _, kept, sums = lax.fori_loop(0, size, step, (cargo, kept, sums))
    return kept, _travel(axes, size, sums)


def _softmax_block(axes, size, with_gradients, image, text, scale):
    """One device's part of the softmax loss, and of its gradients if asked for."""
    rows = len(image)
    zero = jnp.zeros(())
    unseen = (jnp.full(rows, -jnp.inf), jnp.zeros(rows))

    # A log-sum-exp seen so far is kept as (largest, sum of exp(logits - largest)): its logarithm
    # would be rounded to the size of the logits, and so would the probabilities.
    def extend(seen, logits, axis):
        largest = jnp.maximum(seen[0], jnp.max(logits, axis))
        terms = jnp.exp(logits - jnp.expand_dims(largest, axis))
        return largest, seen[1] * jnp.exp(seen[0] - largest) + jnp.sum(terms, axis)

    # First round: the normaliser of each image over all texts, which stays here, and that of each
    # text over all images, which travels with the text.
    def normalise(own, text, kept, over_images):
        over_texts, matching = kept
        logits = scale * _dot(image, text, (1, 1))
        matching = jnp.where(own, jnp.diagonal(logits), matching)
        return (extend(over_texts, logits, 1), matching), extend(over_images, logits, 0)

    (over_texts, matching), over_images = _ring(
        normalise, axes, size, text, (unseen, jnp.zeros(rows)), unseen
    )
    losses = [largest - matching + jnp.log(total) for largest, total in (over_texts, over_images)]
    loss = lax.psum(0.5 * jnp.sum(losses[0] + losses[1]), axes)
    if not with_gradients:
        return loss

    # Second round: with both normalisers known, each block's gradient is final.
    def differentiate(own, cargo, kept, d_text):
        text, (largest, total) = cargo
        d_image, d_scale = kept
        cosines = _dot(image, text, (1, 1))
        logits = scale * cosines
        p_text = jnp.exp(logits - over_texts[0][:, None]) / over_texts[1][:, None]
        p_image = jnp.exp(logits - largest) / total
        d_logits = 0.5 * (p_text + p_image) - own * jnp.eye(rows)
        d_image += scale * _dot(d_logits, text, (1, 0))
        d_text += scale * _dot(d_logits, image, (0, 0))
        return (d_image, d_scale + jnp.sum(d_logits * cosines)), d_text

    zeros = jnp.zeros(image.shape)
    (d_image, d_scale), d_text = _ring(
        differentiate, axes, size, (text, over_images), (zeros, zero), zeros
    )
    return loss, (d_image, d_text, lax.psum(d_scale, axes))


def _sigmoid_block(axes, size, with_gradients, image, text, scale, bias):
    """One device's part of the sigmoid loss, and of its gradients if asked for."""
    rows = len(image)
    zero = jnp.zeros(())

    def logits_and_signs(own, text):
        cosines = _dot(image, text, (1, 1))
        return cosines, scale * cosines + bias, 2.0 * own * jnp.eye(rows) - 1.0

    def evaluate(own, text, loss, _):
        _, logits, signs = logits_and_signs(own, text)
        return loss - jnp.sum(jax.nn.log_sigmoid(signs * logits)), None

    def evaluate_and_differentiate(own, text, kept, d_text):
        loss, d_image, d_scale, d_bias = kept
        cosines, logits, signs = logits_and_signs(own, text)
        loss -= jnp.sum(jax.nn.log_sigmoid(signs * logits))
        d_logits = -signs * jax.nn.sigmoid(-signs * logits)
        d_image += scale * _dot(d_logits, text, (1, 0))
        d_text += scale * _dot(d_logits, image, (0, 0))
        d_scale += jnp.sum(d_logits * cosines)
        return (loss, d_image, d_scale, d_bias + jnp.sum(d_logits)), d_text

    if not with_gradients:
        loss, _ = _ring(evaluate, axes, size, text, zero, None)
        return lax.psum(loss, axes)
    zeros = jnp.zeros(image.shape)
    kept, d_text = _ring(
        evaluate_and_differentiate, axes, size, text, (zero, zeros, zero, zero), zeros
    )
    loss, d_image, d_scale, d_bias = kept
    loss, d_scale, d_bias = lax.psum((loss, d_scale, d_bias), axes)
    return loss, (d_image, d_text, d_scale, d_bias)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _on_the_mesh(block, mesh, axes, image, text, *scalars):
    """`block` under shard_map; differentiating it runs the gradients computed beside the loss.

    The rule stands outside of the shard_map: JAX differentiates through neither the loop nor the
    collectives, and the residuals are the gradients themselves.
    """
    return _shard(block, mesh, axes, len(scalars), False)(image, text, *scalars)


def _shard(block, mesh, axes, scalars, with_gradients):
    size = math.prod(mesh.shape[axis] for axis in axes)
    features, replicated = P(axes), (P(),) * scalars
    gradients = (features, features, *replicated)
    return jax.shard_map(
        functools.partial(block, axes, size, with_gradients),
        mesh=mesh,
        in_specs=gradients,
        out_specs=(P(), gradients) if with_gradients else P(),
    )


def _forward(block, mesh, axes, image, text, *scalars):
    return _shard(block, mesh, axes, len(scalars), True)(image, text, *scalars)


def _backward(block, mesh, axes, gradients, cotangent):
    return jax.tree.map(lambda gradient: cotangent * gradient, gradients)


_on_the_mesh.defvjp(_forward, _backward)


def _ring_loss(block, image, text, scalars, mesh, axes):
    axes = (axes,) if isinstance(axes, str) else tuple(axes)
    _check_pairs(image, text)
    for axis in axes:
        if axis not in mesh.shape:
            raise UnknownNameError(
                f"The mesh has no axis {axis!r} to run the ring over; {nearest(axis, mesh.shape)}"
            )
    size = math.prod(mesh.shape[axis] for axis in axes)
    if len(image) % size:
        raise ValueError(
            f"A batch of {len(image)} pairs does not divide into the {size} parts of the mesh axes "
            f"{axes}: make the batch size a multiple of {size}."
        )
    loss = _on_the_mesh(block, mesh, axes, *_float32(image, text, *scalars))
    return loss, jnp.float32(len(image))


def ring_softmax_contrastive(
    image: Float[Array, "b d"],
    text: Float[Array, "b d"],
    scale: Float[Array, ""],
    mesh: Mesh | AbstractMesh,
    axes: str | Sequence[str],
) -> tuple[Scalar, Scalar]:
    """`softmax_contrastive` with memory per device that does not depend on the number of devices.

    Two rounds of the ring with gradients (normalisers, then gradients), one without.

    Args:
      image, text, scale: as for `softmax_contrastive`; the features are (or get) sharded over
        `axes`.
      mesh: the mesh of the computation.
      axes: its axes over which the batch is sharded, e.g. ("data", "fsdp"); the work is repeated
        along the other ones.

    Returns:
      (sum over pairs, number of pairs), float32 scalars, the same on all devices.

    Raises:
      UnknownNameError: if the mesh lacks an axis.
      ValueError: if the features differ in shape, or the batch does not divide into the axes.
    """
    return _ring_loss(_softmax_block, image, text, (scale,), mesh, axes)


def ring_sigmoid_contrastive(
    image: Float[Array, "b d"],
    text: Float[Array, "b d"],
    scale: Float[Array, ""],
    bias: Float[Array, ""],
    mesh: Mesh | AbstractMesh,
    axes: str | Sequence[str],
) -> tuple[Scalar, Scalar]:
    """`sigmoid_contrastive` with memory per device that does not depend on the number of devices.

    One round of the ring, with or without gradients.

    Args:
      image, text, scale, bias: as for `sigmoid_contrastive`; the features are (or get) sharded over
        `axes`.
      mesh: the mesh of the computation.
      axes: its axes over which the batch is sharded, e.g. ("data", "fsdp"); the work is repeated
        along the other ones.

    Returns:
      (sum over all B * B pairs, B), float32 scalars, the same on all devices.

    Raises:
      UnknownNameError: if the mesh lacks an axis.
      ValueError: if the features differ in shape, or the batch does not divide into the axes.
    """
    return _ring_loss(_sigmoid_block, image, text, (scale, bias), mesh, axes)
