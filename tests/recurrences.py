"""Layers with a loop of their own, and their adapters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import keras
import numpy as np
import tensorflow as tf
from helpers import BATCH, FEATURES, Case, make_step, normal, randomize

from keras_jacmon import Recurrence
from keras_jacmon.model.adapted_cell import AdaptedCall

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

ops = keras.ops


class Weighted(keras.layers.Layer):
    """A layer with an input kernel, a recurrent kernel and a vector."""

    def __init__(self, units: int = 3, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.units = units

    def build(self, shape: Any) -> None:
        self.kernel = self.add_weight(shape=(shape[-1], self.units), name="kernel")
        self.recurrent_kernel = self.add_weight(shape=(self.units, self.units), name="recurrent_kernel")
        self.vector = self.add_weight(shape=(self.units,), name="vector", initializer="zeros")

    def zeros(self, x: Any) -> Any:
        return ops.zeros((ops.shape(x)[0], self.units), self.compute_dtype)


def linear_scan(a: Any, b: Any) -> Any:
    """`h_t = a_t h_{t-1} + b_t` from zero, all steps at once, `(batch, time, ...)`."""

    def combine(left: Any, right: Any) -> Any:
        return left[0] * right[0], right[0] * left[1] + right[1]

    # The scan of Keras forgets the shape.
    return ops.reshape(ops.associative_scan(combine, (a, b), axis=1)[1], ops.shape(b))


class MinGRU(Weighted):
    """`h' = (1 - z(x)) h + z(x) c(x)` (arXiv 2410.01201), by an associative scan."""

    def gates(self, x: Any) -> Any:
        z = ops.sigmoid(x @ ops.convert_to_tensor(self.kernel) + self.vector)
        return z, ops.tanh(x @ ops.convert_to_tensor(self.kernel))

    def call(self, x: Any) -> Any:
        z, c = self.gates(x)
        return linear_scan(1 - z, z * c)


def of_min_gru(layer: Any, x: Any) -> Recurrence:
    def step(x: Any, states: Any) -> Any:
        z, c = layer.gates(x)
        h = (1 - z) * states[0] + z * c
        return h, [h]

    return Recurrence(x, [layer.zeros(x)], step)


class ScanRNN(Weighted):
    """A tanh RNN by `keras.ops.scan`; returns the last state alone, and steps over what a mask leaves out."""

    def __init__(self, units: int = 3, **kwargs: Any) -> None:
        super().__init__(units, **kwargs)
        self.supports_masking = True

    def call(self, x: Any, mask: Any = None) -> Any:
        kept = ops.ones(ops.shape(x)[:2], "bool") if mask is None else mask

        def step(h: Any, here: Any) -> Any:
            new, _ = self.step(here[0], [h])
            return ops.where(here[1][:, None], new, h), h

        return ops.scan(step, self.zeros(x), (ops.swapaxes(x, 0, 1), ops.swapaxes(kept, 0, 1)))[0]

    def compute_mask(self, _: Any, mask: Any = None) -> None:
        """The output has no steps."""

    def step(self, x: Any, states: Any) -> Any:
        kernel, recurrent_kernel = map(ops.convert_to_tensor, (self.kernel, self.recurrent_kernel))
        h = ops.tanh(x @ kernel + states[0] @ recurrent_kernel + self.vector)
        return h, [h]


def of_scan_rnn(layer: Any, x: Any, mask: Any = None) -> Recurrence:
    return Recurrence(x, [layer.zeros(x)], layer.step, mask)


class LoopLSTM(keras.layers.Layer):
    """A Python loop around a cell of Keras; returns the output and the states."""

    def __init__(self, units: int = 3, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.cell = keras.layers.LSTMCell(units)

    def build(self, shape: Any) -> None:
        self.cell.build((shape[0], shape[-1]))

    def call(self, x: Any) -> Any:
        states, outputs = self.cell.get_initial_state(ops.shape(x)[0]), []
        for t in range(x.shape[1]):
            output, states = self.cell(x[:, t], states)
            outputs.append(output)
        return ops.stack(outputs, axis=1), *states


def of_loop_lstm(layer: Any, x: Any) -> Recurrence:
    return Recurrence(x, layer.cell.get_initial_state(ops.shape(x)[0]), layer.cell)


class ConvolutionSSM(Weighted):
    """`h' = λ h + x W`, as the convolution with `λ^k`; the adapter takes λ from around the step."""

    def decay(self) -> Any:
        return ops.sigmoid(1.0 + self.vector)

    def call(self, x: Any) -> Any:
        steps = np.arange(x.shape[1])
        powers = ops.power(self.decay(), np.maximum(steps[:, None] - steps, 0)[..., None].astype(self.compute_dtype))
        kernel = powers * np.tril(np.ones((len(steps), len(steps)), self.compute_dtype))[..., None]
        return ops.einsum("tsn,bsn->btn", kernel, x @ ops.convert_to_tensor(self.kernel))


def of_convolution(layer: Any, x: Any) -> Recurrence:
    decay = layer.decay()

    def step(x: Any, h: Any) -> Any:
        h = decay * h + x @ ops.convert_to_tensor(layer.kernel)
        return h, h

    return Recurrence(x, layer.zeros(x), step)


class MatrixMemory(Weighted):
    """The matrix state of RWKV and of gated linear attention: `S' = diag(w(x)) S + k(x) v(x)ᵀ`, output `r(x) S'`."""

    def build(self, shape: Any) -> None:
        super().build(shape)
        self.projections = [self.add_weight(shape=(shape[-1], self.units), name=name) for name in "wkvr"]

    def projected(self, x: Any) -> Any:
        w, k, v, r = (x @ ops.convert_to_tensor(projection) for projection in self.projections)
        return {"w": ops.exp(-ops.exp(w)), "k": k, "v": v, "r": r}

    def call(self, x: Any) -> Any:
        p = self.projected(x)
        written = p["k"][..., None] * p["v"][..., None, :]
        memory = linear_scan(p["w"][..., None] * ops.ones_like(written), written)
        return ops.einsum("btk,btkv->btv", p["r"], memory)


def of_matrix_memory(layer: Any, x: Any) -> Recurrence:
    def step(p: Any, S: Any) -> Any:
        S = p["w"][:, :, None] * S + p["k"][:, :, None] * p["v"][:, None, :]
        return ops.einsum("bk,bkv->bv", p["r"], S), S

    p = layer.projected(x)
    return Recurrence(p, ops.zeros((ops.shape(x)[0], layer.units, layer.units)), step)


class LRU(Weighted):
    """`h' = λ h + x B` with complex λ (arXiv 2303.06349), by an associative scan; output `Re(h C)`."""

    def build(self, shape: Any) -> None:
        super().build(shape)
        self.phase = self.add_weight(shape=(self.units,), name="phase")

    @property
    def eigenvalues(self) -> Any:
        modulus, phase = ops.exp(-ops.exp(ops.convert_to_tensor(self.vector))), ops.convert_to_tensor(self.phase)
        return tf.complex(modulus * ops.cos(phase), modulus * ops.sin(phase))

    def driven(self, x: Any) -> Any:
        driven = x @ ops.convert_to_tensor(self.kernel)
        return tf.complex(driven, tf.zeros_like(driven))

    def call(self, x: Any) -> Any:
        b = self.driven(x)
        h = linear_scan(self.eigenvalues * tf.ones_like(b), b)
        return tf.math.real(h) @ ops.convert_to_tensor(self.recurrent_kernel)


def of_lru(layer: Any, x: Any) -> Recurrence:
    def step(x: Any, states: Any) -> Any:
        h = layer.eigenvalues * states[0] + layer.driven(x)
        return tf.math.real(h) @ ops.convert_to_tensor(layer.recurrent_kernel), [h]

    return Recurrence(x, [tf.complex(layer.zeros(x), layer.zeros(x))], step)


class TimedRNN(Weighted):
    """A liquid network in closed form: `(x, timespans)` and a context for all steps go in, its states are nested."""

    def step(self, inputs: Any, states: Any) -> Any:
        kernel, recurrent_kernel = map(ops.convert_to_tensor, (self.kernel, self.recurrent_kernel))
        (x, span), context = inputs["at"], inputs["context"]
        h, slow = states["fast"], states["memory"]["slow"]
        gate = ops.exp(-span * ops.softplus(x @ kernel + h @ recurrent_kernel))
        h = gate * h + (1 - gate) * ops.tanh(context + slow)
        return h, {"fast": h, "memory": {"slow": 0.5 * slow + h}}

    def initial(self, x: Any) -> Any:
        return {"fast": self.zeros(x), "memory": {"slow": self.zeros(x)}}

    def build(self, shape: Any) -> None:
        super().build(shape["x"])

    def call(self, inputs: Any) -> Any:
        states, outputs = self.initial(inputs["x"]), []
        for t in range(inputs["x"].shape[1]):
            here = {"at": (inputs["x"][:, t], inputs["spans"][:, t]), "context": inputs["context"]}
            output, states = self.step(here, states)
            outputs.append(output)
        return ops.stack(outputs, axis=1)


def of_timed_rnn(layer: Any, inputs: Any) -> Recurrence:
    by_step = {"at": (inputs["x"], inputs["spans"]), "context": inputs["context"][:, None]}
    return Recurrence(by_step, layer.initial(inputs["x"]), layer.step)


@dataclass(frozen=True)
class Loop:
    """A layer with a loop of its own, and its adapter."""

    id: str
    make: Callable[..., Any]
    adapter: Callable[..., Recurrence]

    def __str__(self) -> str:
        return self.id


LOOPS = [
    Loop("min_gru", MinGRU, of_min_gru),
    Loop("scan_rnn", ScanRNN, of_scan_rnn),
    Loop("loop_lstm", LoopLSTM, of_loop_lstm),
    Loop("convolution_ssm", ConvolutionSSM, of_convolution),
    Loop("matrix_memory", MatrixMemory, of_matrix_memory),
    Loop("lru", LRU, of_lru),
    Loop("timed_rnn", TimedRNN, of_timed_rnn),
]


def make_cell_step(case: Case | Loop) -> tuple[Any, Any, Any]:
    """A built cell with inputs and random states for one step; of a loop, the cell that its adapter makes it."""
    if isinstance(case, Case):
        return make_step(case)
    keras.utils.set_random_seed(5)
    layer, x = case.make(3), tf.constant(normal(BATCH, 2, FEATURES, seed=3))
    inputs: Any = x
    if case.id == "timed_rnn":
        inputs = {"x": x, "spans": tf.abs(x[..., :1]), "context": tf.constant(normal(BATCH, 3, seed=5))}
    layer(inputs)
    randomize(layer)
    inputs = tf.nest.map_structure(lambda leaf: tf.cast(leaf, layer.compute_dtype), inputs)
    adapted = AdaptedCall.of(layer, case.adapter, [inputs], {})
    states = [tf.constant(normal(*state.shape, seed=11), state.dtype) for state in adapted.states]
    return adapted.cell, adapted.inputs[:, 0], states


def real_parts(states: Any) -> list[Any]:
    """The flat states, each as `(batch, n)`, real parts before imaginary ones."""
    flat = []
    for state in tf.nest.flatten(states):
        parts = [tf.math.real(state), tf.math.imag(state)] if state.dtype.is_complex else [state]
        flat.append(tf.concat([tf.reshape(part, [part.shape[0], -1]) for part in parts], axis=1))
    return flat


def from_real_parts(vector: Any, like: Any) -> Any:
    """The states in their structure, from all their real parts side by side."""
    flat = tf.nest.flatten(like)
    sizes = [part.shape[1] for part in real_parts(flat)]
    restored = []
    for part, state in zip(tf.split(vector, sizes, axis=1), flat, strict=True):
        values = tf.complex(*tf.split(part, 2, axis=1)) if state.dtype.is_complex else part
        restored.append(tf.reshape(values, state.shape))
    return tf.nest.pack_sequence_as(like, restored)


def jacobians_by_hand(recurrence: Recurrence) -> NDArray[np.float32]:
    """The joint Jacobians `(time, batch, n, n)` of a plain loop with a tape around each step."""
    time = max(leaf.shape[1] for leaf in tf.nest.flatten(recurrence.inputs))
    states, found = recurrence.states, []
    for t in range(time):
        here = tf.nest.map_structure(lambda leaf: leaf[:, min(t, leaf.shape[1] - 1)], recurrence.inputs)  # noqa: B023
        vector = tf.concat(real_parts(states), axis=1)
        with tf.GradientTape(persistent=True) as tape:
            tape.watch(vector)
            _, new = recurrence.step(here, from_real_parts(vector, states))
            image = tf.concat(real_parts(new), axis=1)
        jacobian = tape.batch_jacobian(image, vector, experimental_use_pfor=False)
        kept = np.ones(image.shape[0], bool) if recurrence.mask is None else recurrence.mask[:, t].numpy()
        found.append(np.where(kept[:, None, None], jacobian, np.nan))
        moved = tf.where(kept[:, None], image, vector)
        states = from_real_parts(moved, states)
    return np.stack(found)
