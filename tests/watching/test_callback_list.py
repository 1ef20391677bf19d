"""The callbacks that stand in the wrong place beside a monitor."""

from __future__ import annotations

import keras
import pytest

from keras_jacmon.watching.callback_list import misplaced

pytestmark = pytest.mark.fast


def test_what_reads_a_value_of_the_monitor_stands_behind_it() -> None:
    reads = [
        keras.callbacks.EarlyStopping(monitor="rnn_jac_variance"),
        keras.callbacks.ModelCheckpoint("best.keras", monitor="rnn_jac_variance"),
    ]
    others = [keras.callbacks.EarlyStopping(monitor="loss"), keras.callbacks.TerminateOnNaN()]
    told = misplaced([*others, *reads], [])
    assert [message.split("`")[1] for message in told] == ["EarlyStopping", "ModelCheckpoint"]
    assert misplaced(others, [*others, *reads]) == []
