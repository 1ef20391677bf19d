"""The pages of the documentation, taken apart."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

ROOT = Path(__file__).parent.parent
BATCH, STEPS, FEATURES = 8, 6, 3


def page(name: str) -> str:
    """The text of a Markdown file, by its path from the root of the repository."""
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(text: str, language: str) -> list[str]:
    """The code blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def table(text: str, header: str) -> list[list[str]]:
    """The cells of all tables with this header."""
    cells = []
    for part in text.split(f"\n{header}\n")[1:]:
        lines = part.partition("\n\n")[0].splitlines()[1:]
        cells += [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells, header
    return cells


def codes(cell: str) -> list[str]:
    """What a cell of a table has between backticks."""
    return re.findall(r"`([^`]+)`", cell)


def run(name: str, names: dict[str, Any]) -> None:
    """Runs the Python blocks of a page, one after another; a later one may use what an earlier one has made."""
    for number, block in enumerate(blocks(page(name), "python"), 1):
        exec(compile(block, f"{name}, block {number}", "exec"), names)  # noqa: S102 - the page is ours


def reader_names() -> dict[str, Any]:
    """What the pages of the documentation take for granted: a compiled model, data, and the names of Keras."""
    keras.utils.set_random_seed(0)
    layers = [keras.Input((STEPS, FEATURES)), keras.layers.LSTM(4, name="lstm"), keras.layers.Dense(1)]
    model = keras.Sequential(layers)
    model.compile("sgd", "mse")
    random = np.random.default_rng(0)
    x = random.normal(size=(BATCH, STEPS, FEATURES)).astype(np.float32)
    y = random.normal(size=(BATCH, 1)).astype(np.float32)
    return {
        **{name: getattr(keras.layers, name) for name in dir(keras.layers) if name[0].isupper()},
        "Sequential": keras.Sequential,
        "keras": keras,
        "model": model,
        "np": np,
        "ops": keras.ops,
        "tf": tf,
        "x": x,
        "y": y,
    }
