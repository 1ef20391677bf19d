"""Draws the README's picture: the gain of a gradient by training step and position, in the quickstart's first epoch.

Needs matplotlib beside the extra `examples`:

    pip install '.[examples]' matplotlib && python docs/draw_picture.py
"""

import io
import runpy
from pathlib import Path

import keras
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.colors import LogNorm
from PIL import Image

from keras_jacmon import JacobianMonitor

DOCS = Path(__file__).parent
PICTURE = DOCS / "images" / "quickstart.png"
EPOCHS = 1


def gains_during_training() -> tuple[list[int], np.ndarray]:
    """Trains the quickstart's model.

    Returns:
        The training steps that were measured, and the gains `(training step, position)`: the geometric mean over the
        samples of the size of a gradient that has travelled from the last position back to this one.
    """
    quickstart = runpy.run_path(str(DOCS.parent / "examples" / "quickstart.py"))
    keras.utils.set_random_seed(0)
    train, test, train_classes, _ = quickstart["load_sequences"]()
    monitor = JacobianMonitor(test[:32], measures="joint/flow", update_freq="batch", log_dir=None)
    model = quickstart["make_model"]()
    model.fit(train, train_classes, batch_size=32, epochs=EPOCHS, callbacks=[monitor], verbose=0)
    flows = [report["lstm"]["joint/flow"].mean(axis=1) for _, report in monitor.reports]
    # The first span is the last position.
    return [step for step, _ in monitor.reports], np.exp(np.array(flows)[:, ::-1])


def draw(steps: list[int], gains: np.ndarray) -> None:
    """Writes the picture."""
    figure, axes = plt.subplots(figsize=(7.2, 3.0), dpi=110, layout="constrained")
    scale = LogNorm(vmin=1e-4, vmax=1.0)
    mesh = axes.pcolormesh(np.arange(gains.shape[1]), steps, gains, cmap="magma", norm=scale)
    axes.contour(gains, levels=[0.01], colors="white", linewidths=1)
    axes.set(
        xlabel="position in the sequence (pixel)",
        ylabel="training step",
        title="The gain of a gradient from the last pixel back to each pixel (white line: 0.01)",
    )
    axes.title.set_fontsize("medium")
    figure.colorbar(mesh, ax=axes, label="gain", extend="min")
    buffer = io.BytesIO()
    figure.savefig(buffer)
    PICTURE.parent.mkdir(exist_ok=True)
    Image.open(buffer).convert("RGB").quantize(128).save(PICTURE, optimize=True)


if __name__ == "__main__":
    draw(*gains_during_training())
