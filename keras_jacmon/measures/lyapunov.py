"""Lyapunov exponents: how fast nearby trajectories of a cell part or meet.

Orthonormal columns Q are led along the trajectory, `Q R = J_t Q`, forwards in time, and the exponents are the means of
`log R_ii`: the first tells how fast lengths grow, the first two how fast areas do, and so on. Unlike the flow, which
looks back from the last step, they follow the map itself, by products with J.

A long sequence is run through in segments of time, the first one first; a carry leads from one to the next.

References:
    G. Benettin et al., "Lyapunov characteristic exponents for smooth dynamical systems and for Hamiltonian systems; a
    method for computing all of them", 1980.
"""

from typing import NamedTuple

import numpy as np
import tensorflow as tf

from keras_jacmon.measures.steps import Steps


class LyapunovCarry(NamedTuple):
    """The state of the iteration.

    Attributes:
        vectors: Tensor `(samples, n, k)`, columns that are orthonormal after each QR.
        sums: Tensor `(samples, k)`, float64, sums of the logarithms that count.
        taken: Tensor `(samples,)`, number of steps that each sample has taken; skipped steps do not count.
        pending: Tensor `(samples,)`, number of steps that each sample has taken since the last QR.
        since: Scalar tensor, number of steps since the last QR, skipped or not.
    """

    vectors: tf.Tensor
    sums: tf.Tensor
    taken: tf.Tensor
    pending: tf.Tensor
    since: tf.Tensor


def start_lyapunov(
    samples: int | tf.Tensor, size: int, k: int, seed: tf.Tensor | tuple[int, int], dtype: tf.DType
) -> LyapunovCarry:
    """Random orthonormal columns at the beginning of the sequence.

    Args:
        samples: Integer, number of samples.
        size: Integer, number of units n.
        k: Integer, number of exponents, from the largest on.
        seed: Tensor `(2,)`, seed of `tf.random.stateless_normal`.
        dtype: Type of the operators.

    Raises:
        ValueError: If `k` is not between 1 and `size`.
    """
    if not 1 <= k <= size:
        raise ValueError(f"Invalid value for argument `k`. Expected 1 to {size}, the number of units. Received: k={k}")
    # Random, since unit vectors may lie in directions that J does away with while others would live.
    vectors, _ = tf.linalg.qr(tf.random.stateless_normal([samples, size, k], seed, dtype=dtype))
    none = tf.zeros([samples], tf.int32)
    return LyapunovCarry(vectors, tf.zeros([samples, k], tf.float64), none, none, tf.constant(0))


def lyapunov_segment(steps: Steps, carry: LyapunovCarry, *, warmup: int, qr_every: int = 1) -> LyapunovCarry:
    """Leads the columns through a segment of time.

    Costs k products with J for each step, and O(n k²) for each QR.

    Args:
        steps: The segment.
        carry: From `start_lyapunov`, or from the segment before.
        warmup: Integer, number of first steps of each sample that turn the columns into the directions that grow most,
            and do not count.
        qr_every: Integer, number of steps between two QRs. In between, columns draw near to each other and grow: a
            spread of the exponents times `qr_every` of more than 13 nats (33 in float64) is lost to rounding, as is a
            growth that overflows. Defaults to 1.

    Returns:
        The carry for the next segment, or for `lyapunov_exponents`.
    """

    def body(t: tf.Tensor, carry: LyapunovCarry) -> tuple[tf.Tensor, LyapunovCarry]:
        valid = steps.valid(t)
        one = tf.cast(valid, tf.int32)
        images = tf.linalg.matrix_transpose(steps.multiply(t, tf.linalg.matrix_transpose(carry.vectors)))
        carry = LyapunovCarry(images, carry.sums, carry.taken + one, carry.pending + one, carry.since + 1)
        if qr_every == 1:
            return t + 1, _orthonormalised(carry, warmup)
        # Also where a warm-up ends, so that no interval between QRs is partly one.
        due = tf.reduce_any(valid & tf.equal(carry.taken, warmup)) | (carry.since >= qr_every)
        return t + 1, tf.cond(due, lambda: _orthonormalised(carry, warmup), lambda: carry)

    _, carry = tf.while_loop(lambda t, _: t < steps.time, body, [tf.constant(0), carry])
    return carry


def lyapunov_exponents(carry: LyapunovCarry, *, warmup: int) -> tf.Tensor:
    """The leading exponents of each sample, in nats per step: < 0 forgets, > 0 is chaos.

    Args:
        carry: From the last segment.
        warmup: As in `lyapunov_segment`.

    Returns:
        `(k, samples)`, in the order of the columns: the largest first, but for fluctuations. -inf for
        directions that some step does away with, up to rounding; NaN for samples with no step after the warm-up.
    """
    carry = _orthonormalised(carry, warmup)
    counts = tf.cast(tf.maximum(carry.taken - warmup, 0), tf.float64)
    return tf.transpose(tf.cast(carry.sums / counts[:, None], carry.vectors.dtype))


def kaplan_yorke(exponents: tf.Tensor, size: int) -> tf.Tensor:
    """The Kaplan-Yorke dimension of the attractor: the dimension whose volumes neither grow nor shrink.

    `j + (λ_1 + ... + λ_j) / |λ_{j+1}|` with the largest j for which the sum is not negative; 0 if all exponents are,
    n if all sums are not.

    Args:
        exponents: Nats per step, `(k, samples)`.
        size: Integer, number of units n.

    Returns:
        `(samples,)`; NaN if the k exponents that are given do not decide it. All n always do.

    References:
        J. L. Kaplan, J. A. Yorke, "Chaotic behavior of multidimensional difference equations", 1979.
    """
    exponents = tf.convert_to_tensor(exponents)
    ordered = tf.sort(exponents, axis=0, direction="DESCENDING")
    sums = tf.cumsum(ordered, axis=0)
    # A sum that has become negative stays so: what follows is smaller still.
    whole = tf.reduce_sum(tf.cast(sums >= 0, tf.int32), axis=0)
    place = tf.minimum(whole, tf.shape(ordered)[0] - 1)
    next_exponent = tf.gather(tf.transpose(ordered), place, batch_dims=1)
    before = tf.gather(tf.transpose(tf.pad(sums, [[1, 0], [0, 0]])), place, batch_dims=1)
    dimension = tf.cast(whole, exponents.dtype)
    decided = dimension - before / next_exponent
    full = (
        dimension
        if exponents.shape[0] == size
        else tf.fill(tf.shape(whole), tf.constant(float("nan"), exponents.dtype))
    )
    result = tf.where(whole < tf.shape(ordered)[0], decided, full)
    return tf.where(tf.reduce_any(tf.math.is_nan(exponents), axis=0), tf.constant(float("nan"), result.dtype), result)


class ScaledQR(NamedTuple):
    """The QR decomposition of vectors, `vectors = q r scale`.

    Attributes:
        q: Tensor `(samples, n, k)`, orthonormal columns.
        r: Tensor `(samples, k, k)`, upper triangular.
        scale: Tensor `(samples, k)`, the factors of the columns of r.
    """

    q: tf.Tensor
    r: tf.Tensor
    scale: tf.Tensor


def scaled_qr(vectors: tf.Tensor) -> ScaledQR:
    """The QR decomposition of columns `(samples, n, k)`, also of very short and very long ones."""
    # Each column by its own scale: Householder's squares may underflow in some.
    scale = tf.reduce_max(tf.abs(vectors), axis=1)
    q, r = tf.linalg.qr(tf.math.divide_no_nan(vectors, scale[:, None]))
    return ScaledQR(q, r, scale)


def diagonal_lengths(r: tf.Tensor) -> tf.Tensor:
    """`|r_ii|`, `(samples, k)`; zero for a column that has lost its direction to rounding."""
    lengths = tf.abs(tf.linalg.diag_part(r))
    # A column that is a sum of those before it but for rounding has lost its direction: q then holds another one, which
    # is orthogonal to all others.
    rounding = 10 * np.finfo(r.dtype.as_numpy_dtype).eps * tf.norm(r, axis=-2)
    return tf.where(lengths <= rounding, tf.zeros_like(lengths), lengths)


def _orthonormalised(carry: LyapunovCarry, warmup: int) -> LyapunovCarry:
    """The carry after one QR; its logarithms count for samples whose warm-up was over at the QR before."""
    split = scaled_qr(carry.vectors)
    logs = tf.math.log(tf.cast(diagonal_lengths(split.r), tf.float64)) + tf.math.log(tf.cast(split.scale, tf.float64))
    # Without a step the logarithms are rounding.
    counts = (carry.pending > 0) & (carry.taken - carry.pending >= warmup)
    sums = carry.sums + tf.where(counts[:, None], logs, tf.zeros_like(logs))
    # The signs of the columns of q do not matter: |R_ii| is what a positive diagonal would have.
    return LyapunovCarry(split.q, sums, carry.taken, tf.zeros_like(carry.pending), tf.zeros_like(carry.since))
