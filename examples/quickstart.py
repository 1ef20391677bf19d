"""Watch the Jacobians of an LSTM that learns to read handwritten digits pixel by pixel.

Each 8 x 8 image of scikit-learn's `load_digits` is a sequence of 64 steps with one pixel each. The LSTM can tell the
digit only if the state at the last step still holds something of the first pixels. The monitor shows the
state-to-state Jacobians before, during and after the training.

    python examples/quickstart.py [log_dir]
"""

import sys
from collections import defaultdict
from pathlib import Path

import keras
import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from keras_jacmon import JacobianMonitor, measure

MEASURES = ("variance", "rms_singular_value", "spectral_norm")
EPOCHS = 15


def load_sequences() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Returns the sequences `(images, 64, 1)` for training and for testing, and the classes of both."""
    digits = load_digits()
    sequences = (digits.data / 16.0).astype("float32")[..., np.newaxis]
    train, test, train_classes, test_classes = train_test_split(
        sequences, digits.target, test_size=300, stratify=digits.target, random_state=0
    )
    return train, test, train_classes, test_classes


def make_model() -> keras.Model:
    """Returns the compiled model: an LSTM of 64 units and a softmax over the ten digits."""
    model = keras.Sequential([keras.Input((64, 1)), keras.layers.LSTM(64), keras.layers.Dense(10, "softmax")])
    model.compile(keras.optimizers.Adam(5e-3, clipnorm=1.0), "sparse_categorical_crossentropy", metrics=["accuracy"])
    return model


def written_tags(log_dir: Path) -> dict[str, set[str]]:
    """Returns the tags in the event files below `log_dir`, by kind."""
    tags = defaultdict(set)
    for directory in {file.parent for file in log_dir.rglob("*.tfevents.*")}:
        events = EventAccumulator(str(directory))
        events.Reload()
        for tag in events.Tags()["tensors"]:
            tags[events.SummaryMetadata(tag).plugin_data.plugin_name].add(tag)
    return tags


def main(log_dir: Path) -> None:
    """Trains the model, prints the first and the last report, and checks the event files."""
    keras.utils.set_random_seed(0)
    train, test, train_classes, test_classes = load_sequences()
    probe, test, test_classes = test[:32], test[32:], test_classes[32:]

    model = make_model()
    print("Before training one could", *measure(model, probe).verdict["lstm"].suggestions, "", sep="\n")
    monitor = JacobianMonitor(probe, log_dir=log_dir)
    history = model.fit(train, train_classes, batch_size=32, epochs=EPOCHS, callbacks=[monitor], verbose=2)
    _, accuracy = model.evaluate(test, test_classes, verbose=0)

    (first_step, before), (last_step, after) = monitor.reports[0], monitor.reports[-1]
    print(f"\nBefore training (step {first_step}):\n{before}")
    print(f"\nAfter training (step {last_step}):\n{after}")
    print(f"\nAccuracy on {len(test)} images that were not used for training: {accuracy:.1%}")
    print(f"Curves: tensorboard --logdir {log_dir}")

    assert accuracy > 0.6, "guessing gives 10 %"
    assert len(history.history["lstm_jac_joint_growth"]) == EPOCHS, "History has one value for each epoch"
    # A horizon beyond the sequence is infinite.
    finite = [[x for key, x in report.scalars().items() if "horizon" not in key] for _, report in monitor.reports]
    assert np.isfinite(finite).all()
    tags = written_tags(log_dir / "jacobian")
    measured = {f"lstm/{view}{measure}" for view in ("", "joint/") for measure in MEASURES}
    over_time = {"lstm/joint/growth", "lstm/joint/horizon"}
    margins = {f"lstm/joint/variance/{part}" for part in ("least", "greatest")}
    assert tags["scalars"] == measured | over_time | margins
    assert tags["custom_scalars"] == {"custom_scalars__config__"}
    assert tags["keras_jacmon"] == {"lstm/packed"}
    assert written_tags(log_dir / "jacobian" / "min")["scalars"] == measured


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "logs"))
