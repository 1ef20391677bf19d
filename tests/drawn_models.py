"""Whole models drawn at random, and what each recurrent layer of one receives.

A draw is a description, from which the same model can be made more than once. What Keras cannot run is not drawn:
states in a dict that is not in a list, stateful layers with states in a nested tuple, masks in a stack of one LSTM. Its
`RNN` hands no constants to a cell; a cell has its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf
from helpers import normal
from hypothesis import strategies as st

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import NDArray

L = keras.layers
IDS = 5  # of an embedding; 0 is masked
HALF = ("mixed_float16", "mixed_bfloat16")
POLICIES = ("float32", "float32", "float32", "float64", *HALF)
ACTIVATIONS = ("tanh", "sigmoid", "relu", "linear", "softplus", "elu", "gelu", "silu", "hard_sigmoid", "softmax")
BUILT_IN = ("SimpleRNN", "LSTM", "GRU")
STYLES = ("sequential", "functional", "subclassed")


# Cells ---------------------------------------------------------------------------------------------------------------


class Parts(NamedTuple):
    """What a term is made of: an old state, its product with a kernel, a square kernel, a frozen weight, the inputs."""

    h: Any
    p: Any
    V: Any
    F: Any
    x: Any


# From `softmax` on J has no structure.
TERMS: Mapping[str, Callable[[Parts], Any]] = {
    "product": lambda t: t.p,
    "diagonal": lambda t: 0.5 * t.h if t.h.shape[-1] == t.p.shape[-1] else t.p,
    "gated": lambda t: t.p * tf.sigmoid(t.x),
    "frozen": lambda t: t.p * t.F,
    "constant": lambda t: t.p * tf.cast(tf.linspace(0.5, -1.5, t.p.shape[-1]), t.p.dtype),
    "chain": lambda t: tf.tanh(t.p) @ t.V,
    "softmax": lambda t: tf.nn.softmax(t.p),
    "squares": lambda t: t.p / (1.0 + tf.reduce_sum(t.h * t.h, axis=-1, keepdims=True)),
    "sum": lambda t: t.p * tf.reduce_sum(tf.tanh(t.h), axis=-1, keepdims=True),
}


@keras.saving.register_keras_serializable("drawn_models")
class OddCell(keras.layers.Layer):
    """Each new state is an activation of the sum of drawn terms.

    Args:
        state_size: An integer, or a list that may nest lists and dicts.
        recipes: For each of the flat states its activation and its terms: a kind and the position of an old state.
        counter: Whether the cell counts its calls in a `tf.Variable`, of which Keras knows nothing.
    """

    def __init__(self, state_size: Any, recipes: Any, *, counter: bool, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.config = {"state_size": state_size, "recipes": recipes, "counter": counter}
        self.state_size = state_size
        self.sizes = keras.tree.flatten(state_size)
        self.output_size = self.sizes[0]
        self.counter = tf.Variable(0.0, trainable=False) if counter else None

    def get_config(self) -> dict[str, Any]:
        return super().get_config() | self.config

    def get_initial_state(self, batch_size: int | None = None) -> Any:
        def zeros(size: int) -> Any:
            return keras.ops.zeros((batch_size, size), self.compute_dtype)

        return keras.tree.map_structure(zeros, self.state_size)

    def build(self, input_shape: tuple[int, ...]) -> None:
        def weight(*shape: int, trainable: bool = True) -> Any:
            return self.add_weight(shape=shape, initializer="random_normal", trainable=trainable)

        recipes = zip(self.sizes, self.config["recipes"], strict=True)
        self.kernels = [
            [weight(input_shape[-1], n), weight(n, trainable=False)]
            + [weight(*shape) for _, old in terms for shape in ((self.sizes[old], n), (n, n))]
            for n, (_, terms) in recipes
        ]

    def call(self, inputs: Any, states: Any) -> tuple[Any, Any]:
        old, new = keras.tree.flatten(states), []
        for weights, (activation, terms) in zip(self.kernels, self.config["recipes"], strict=True):
            kernel, F, *kernels = map(tf.convert_to_tensor, weights)
            x = total = inputs @ kernel
            for (kind, position), W, V in zip(terms, kernels[::2], kernels[1::2], strict=True):
                h = old[position]
                total += TERMS[kind](Parts(h, h @ W, V, F, x))
            new.append(keras.activations.get(activation)(total))
        if self.counter is not None:
            self.counter.assign_add(1.0)
        one = isinstance(self.state_size, int)
        return new[0], new if one else keras.tree.pack_sequence_as(self.state_size, new)


# Descriptions --------------------------------------------------------------------------------------------------------


class Cell(NamedTuple):
    """A cell: `kind` is `OddCell`, or what a cell of Keras is called without its `Cell`."""

    kind: str
    width: int
    options: Mapping[str, Any]

    def make(self, dtype: str) -> Any:
        maker = OddCell if self.kind == "OddCell" else getattr(L, f"{self.kind}Cell")
        return maker(**self.options, dtype=dtype)


class Step(NamedTuple):
    """What a model does next, and the layers that it takes for it; a chain is these layers one behind the other."""

    run: Callable[[Any], Any]
    layers: Sequence[Any]
    is_chain: bool = True


@dataclass(frozen=True)
class Piece:
    """A recurrent layer and what is around it.

    `kind` is a layer of Keras, whose options are those of its only cell, or `RNN` of one cell or a `stack` of them. The
    layer is called `calls` times, one time behind the other; `given` are initial states.
    """

    kind: str
    cells: tuple[Cell, ...]
    dtype: str
    options: Mapping[str, Any]
    wrapper: str
    merge_mode: str | None
    given: bool
    calls: int

    def make(self, *, widened: bool) -> Step:
        dtype = "float32" if widened and self.dtype in HALF else self.dtype
        if self.kind in ("RNN", "stack"):
            cells = [cell.make(dtype) for cell in self.cells]
            cell = L.StackedRNNCells(cells, dtype=dtype) if self.kind == "stack" else cells[0]
            layer = L.RNN(cell, **self.options, dtype=dtype)
        else:
            layer = getattr(L, self.kind)(**self.cells[0].options, **self.options, dtype=dtype)
        sizes, width = list(layer.state_size), self.cells[-1].width
        before, behind = [], []
        if self.kind == "ConvLSTM1D":
            before, behind = [shaped(lambda x: keras.ops.expand_dims(x, -1))], [shaped(lambda x: keras.ops.mean(x, 2))]
        elif self.wrapper == "Bidirectional":
            layer, sizes = L.Bidirectional(layer, merge_mode=self.merge_mode), [*sizes, *sizes]
            behind = [] if self.merge_mode else [L.Concatenate()]
            width *= 1 if self.merge_mode in ("sum", "mul", "ave") else 2
        elif self.wrapper == "TimeDistributed":
            layer = L.TimeDistributed(layer, dtype=dtype)
            before = [shaped(lambda x: keras.ops.stack([x, -x], 1), lambda mask: keras.ops.stack([mask, mask], 1))]
            behind = [shaped(lambda x: keras.ops.mean(x, 1), lambda mask: mask[:, 0])]
        if self.calls == 1 and not self.given:
            return chain(*before, layer, *behind)
        starts = keras.tree.map_structure(L.Dense, sizes) if self.given else None
        first = chain(*([L.Dense(width)] if self.calls > 1 else []))

        def run(x: Any) -> Any:
            x = first.run(x)
            for _ in range(self.calls):
                x = chain(*before).run(x)
                given = {}
                if self.given:
                    given["initial_state"] = keras.tree.map_structure(lambda start: start(x[:, 0]), starts)  # noqa: B023 - called at once
                x = chain(*behind).run(layer(x, **given))
            return x

        return Step(run, [*first.layers, *keras.tree.flatten(starts or []), *before, layer, *behind], is_chain=False)


def chain(*layers: Any) -> Step:
    def run(x: Any) -> Any:
        for layer in layers:
            x = layer(x)
        return x

    return Step(run, layers)


def shaped(function: Callable[[Any], Any], of_mask: Callable[[Any], Any] = lambda mask: mask) -> Any:
    return L.Lambda(function, mask=lambda _, mask: None if mask is None else of_mask(mask))


class Subclassed(keras.Model):
    def __init__(self, steps: Sequence[Step], dtype_of_inputs: str) -> None:
        super().__init__()
        self.parts = [layer for step in steps for layer in step.layers]
        self.runs = [step.run for step in steps]
        self.dtype_of_inputs = dtype_of_inputs

    def build(self, input_shape: Any) -> None:
        # Keras would do it inside a scope in which a stateful layer cannot make its states.
        self.call(keras.KerasTensor(input_shape, self.dtype_of_inputs))

    def call(self, inputs: Any) -> Any:
        for run in self.runs:
            inputs = run(inputs)
        return inputs


@dataclass(frozen=True)
class DrawnModel:
    """A model of pieces, of which the first `inner` are in a model of their own, and a `Dense` behind them.

    `mask` is `(batch, time)`.
    """

    style: str
    source: str
    pieces: tuple[Piece, ...]
    inner: int
    inner_style: str
    mask: tuple[tuple[bool, ...], ...]
    features: int
    known_batch: bool
    known_steps: bool

    def make(self, *, widened: bool = False) -> Any:
        """Makes the model; with `widened`, what is of half precision computes in float32."""
        shape = (len(self.mask) if self.known_batch else None, len(self.mask[0]) if self.known_steps else None)
        sequence = (*shape, self.features)
        steps = [piece.make(widened=widened) for piece in self.pieces]
        if self.inner:
            steps = [chain(compose(self.inner_style, steps[: self.inner], sequence)), *steps[self.inner :]]
        sources = {"Masking": [L.Masking()], "Embedding": [L.Embedding(IDS, self.features, mask_zero=True)]}
        steps = [chain(*sources.get(self.source, [])), *steps, chain(L.Dense(1))]
        if self.source == "Embedding":
            return compose(self.style, steps, shape, "int32")
        return compose(self.style, steps, sequence)

    def inputs(self, *, seed: int, batches: int = 1) -> NDArray[Any]:
        mask = np.tile(self.mask, (batches, 1))
        if self.source == "Embedding":
            return np.where(mask, np.random.default_rng(seed).integers(1, IDS, mask.shape), 0).astype(np.int32)
        x = normal(*mask.shape, self.features, seed=seed)
        return x * mask[..., None] if self.source == "Masking" else x


def compose(style: str, steps: Sequence[Step], shape: tuple[int | None, ...], dtype: str = "float32") -> Any:
    if style == "subclassed":
        return Subclassed(steps, dtype)
    inputs = keras.Input(batch_shape=shape, dtype=dtype)
    if style == "sequential":
        held = [step.layers if step.is_chain else [Subclassed([step], "float32")] for step in steps]
        return keras.Sequential([inputs, *(layer for layers in held for layer in layers)])
    x = inputs
    for step in steps:
        x = step.run(x)
    return keras.Model(inputs, x)


# Strategies ----------------------------------------------------------------------------------------------------------

SELDOM = st.integers(0, 3).map(lambda k: k == 3)


@st.composite
def odd_cells(draw: st.DrawFn) -> Cell:
    sizes = draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    nested: list[Any] = [
        sizes if sizes[1:] else sizes[0],
        [sizes[:1], *sizes[1:]],
        # Not in the order of their keys, in which dicts are flattened.
        [{f"state_{9 - k}": size for k, size in enumerate(sizes)}],
        [{"b": sizes[0], "a": [{"c": size} for size in sizes[1:]]}],
    ]
    state_size = draw(st.sampled_from(nested))
    flat = keras.tree.flatten(state_size)
    term = st.tuples(st.sampled_from(list(TERMS)), st.integers(0, len(flat) - 1))
    recipe = st.tuples(st.sampled_from(ACTIVATIONS), st.lists(term, min_size=1, max_size=2))
    recipes = [draw(recipe) for _ in flat]
    options = {"state_size": state_size, "recipes": recipes, "counter": draw(SELDOM)}
    return Cell("OddCell", flat[0], options)


@st.composite
def built_in_cells(draw: st.DrawFn, kind: str) -> Cell:
    width = draw(st.integers(1, 5))
    options: dict[str, Any] = {"activation": draw(st.sampled_from(ACTIVATIONS)), "use_bias": draw(st.booleans())}
    options |= {"filters": width, "kernel_size": 2, "padding": "same"} if kind == "ConvLSTM1D" else {"units": width}
    if kind == "GRU":
        options["reset_after"] = draw(st.booleans())
    if draw(SELDOM):
        options |= {"dropout": 0.3, "recurrent_dropout": 0.4, "seed": draw(st.sampled_from([None, 3]))}
    return Cell(kind, width, options)


@st.composite
def pieces(draw: st.DrawFn, *, last: bool) -> Piece:
    kind = draw(st.sampled_from([*BUILT_IN, "ConvLSTM1D", "RNN", "RNN", "stack"]))
    if kind in ("RNN", "stack"):
        cell = st.one_of(*map(built_in_cells, BUILT_IN), *[odd_cells()] * 3)
        cells = draw(st.lists(cell, min_size=2, max_size=3) if kind == "stack" else st.tuples(cell))
    else:
        cells = [draw(built_in_cells(kind))]
    wrapper = "" if kind == "ConvLSTM1D" else draw(st.sampled_from(["", "", "", "Bidirectional", "TimeDistributed"]))
    plain = kind != "ConvLSTM1D" and wrapper != "TimeDistributed"
    flags = {"stateful": True, "unroll": kind != "ConvLSTM1D", "go_backwards": wrapper != "Bidirectional"}
    calls = draw(st.sampled_from([1, 1, 1, 1, 2]))
    sequences = not last or not plain or calls > 1 or draw(st.booleans())
    merge_mode = draw(st.sampled_from(["concat", "sum", "mul", "ave", None])) if wrapper == "Bidirectional" else None
    return Piece(
        kind,
        tuple(cells),
        draw(st.sampled_from(POLICIES)),
        {"return_sequences": sequences} | {name: draw(SELDOM) for name, possible in flags.items() if possible},
        wrapper,
        merge_mode,
        given=plain and draw(SELDOM),
        calls=calls,
    )


@st.composite
def models(draw: st.DrawFn) -> DrawnModel:
    """Draws a model."""
    count = draw(st.sampled_from([1, 1, 1, 2, 2, 3]))
    drawn = tuple(draw(pieces(last=k + 1 == count)) for k in range(count))
    sample = st.tuples(*[st.booleans()] * draw(st.integers(1, 6)))
    stateful, unroll = (any(piece.options.get(name) for piece in drawn) for name in ("stateful", "unroll"))
    return DrawnModel(
        draw(st.sampled_from(STYLES)),
        draw(st.sampled_from(["", "Masking", "Embedding"])),
        drawn,
        draw(st.sampled_from([0, draw(st.integers(0, count))])),
        draw(st.sampled_from(STYLES)),
        tuple(draw(st.lists(sample, min_size=1, max_size=4))),
        draw(st.integers(1, 4)),
        known_batch=stateful or draw(st.booleans()),
        known_steps=unroll or draw(st.booleans()),
    )


# What the layers receive ---------------------------------------------------------------------------------------------


class Visit(NamedTuple):
    """A call of the recurrent layer at a position in the model, as `helpers.reference_jacobians` takes it."""

    position: int
    inputs: Any
    states: Any
    mask: Any


def recurrent_layers(model: Any) -> list[Any]:
    return [layer for layer in model._flatten_layers() if isinstance(layer, L.RNN)]


def visits(model: Any, probe: NDArray[Any]) -> list[Visit]:
    """Calls the model, in inference, and keeps what its recurrent layers are called with."""
    found: list[Visit] = []
    layers = recurrent_layers(model)

    def watched(
        position: int, original: Any, inputs: Any, initial_state: Any = None, mask: Any = None, **kw: Any
    ) -> Any:
        layer = layers[position]
        fresh = layer.get_initial_state(inputs.shape[0])
        given = initial_state if initial_state is not None else layer.states if layer.stateful else fresh
        # As the layer casts them, and before it moves on.
        states = [tf.cast(tf.identity(state), layer.cell.compute_dtype) for state in keras.tree.flatten(given)]
        found.append(Visit(position, inputs, keras.tree.pack_sequence_as(fresh, states), mask))
        return original(inputs, initial_state=initial_state, mask=mask, **kw)

    def run(x: Any) -> list[Visit]:
        model(x, training=False)
        return found

    for position, layer in enumerate(layers):
        # Past Keras, which lets no attribute be set on a built layer.
        vars(layer)["call"] = partial(watched, position, layer.call)
    try:
        # As a graph, since half precision is rounded at other places without.
        return list(tf.function(run, autograph=False)(probe))
    finally:
        for layer in layers:
            del vars(layer)["call"]
