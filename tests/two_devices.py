"""Scripts for a process with two devices, into which TensorFlow splits a CPU before its first operation or never."""

from __future__ import annotations

import json
import textwrap

import processes

PRELUDE = """
    import json, pathlib, sys, traceback
    import keras, numpy as np, tensorflow as tf
    from keras_jacmon import JacobianMeter, JacobianMonitor, JacobianRegularizer, measure

    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
    default, mirrored = tf.distribute.get_strategy(), tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])

    def refusal(function):
        try:
            function()
        except ValueError as error:
            return str(error)
        raise AssertionError("not refused")
"""


def run(definitions: str, parts: dict[str, str], *arguments: str) -> dict[str, str]:
    """Runs several scripts one after another in one process.

    Args:
        definitions: Script that is run before the others.
        parts: Scripts by name; each has the names of `PRELUDE` and of the definitions, and none of the others'.
        *arguments: Strings, the arguments of the process.

    Returns:
        The traceback of each script, by its name; empty if it did not fail.
    """
    lines = [textwrap.dedent(PRELUDE), textwrap.dedent(definitions), "outcome = {}"]
    for name, script in parts.items():
        body = textwrap.indent(textwrap.dedent(script), "    ")
        lines += [f"def part():\n{body}", f"try:\n    part()\n    outcome[{name!r}] = ''"]
        lines += [f"except BaseException:\n    outcome[{name!r}] = traceback.format_exc()"]
    finished = processes.run("\n".join([*lines, "print(json.dumps(outcome))"]), *arguments)
    assert finished.returncode == 0, finished.stderr[-5000:]
    outcome: dict[str, str] = json.loads(finished.stdout.splitlines()[-1])
    return outcome
