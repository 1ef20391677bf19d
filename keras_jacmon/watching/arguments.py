"""Checks of the monitor's arguments that need no model."""

import os
import re
from collections.abc import Iterable
from typing import Any

from keras_jacmon.errors import check_whole, did_you_mean, invalid_argument, is_whole
from keras_jacmon.measurement.plan import MeasurementPlan
from keras_jacmon.regularization.regularizer import JacobianRegularizer


def check_arguments(
    *,
    update_freq: Any,
    on_error: Any,
    regularizer: Any,
    on_verdict_change: Any,
    log_dir: Any,
    verbose: Any,
    **whole: Any,
) -> None:
    """Refuses arguments that are invalid with any model."""
    if update_freq not in ("epoch", "batch") and not is_whole(update_freq, 1):
        raise invalid_argument("update_freq", "'epoch', 'batch' or a positive integer", f"update_freq={update_freq!r}")
    if on_error not in ("warn", "raise"):
        raise invalid_argument("on_error", "'warn' or 'raise'", f"on_error={on_error!r}")
    if log_dir is not None and not isinstance(log_dir, (str, os.PathLike)):
        raise invalid_argument("log_dir", "a string, a path or None", f"log_dir={log_dir!r}")
    if verbose not in (0, 1):
        raise invalid_argument("verbose", "0 or 1", f"verbose={verbose!r}")
    for name, value in whole.items():
        check_whole(name, value, 2 if name == "max_reports" else 1)
    if not isinstance(regularizer, (JacobianRegularizer, type(None))):
        raise invalid_argument("regularizer", "a `JacobianRegularizer` or None", f"regularizer={regularizer!r}")
    if on_verdict_change is not None and not callable(on_verdict_change):
        expected, received = "a function or None", f"on_verdict_change={on_verdict_change!r}"
        raise invalid_argument("on_verdict_change", expected, received)


def is_in_epochs(step: Any, update_freq: Any) -> bool:
    """Returns True if the event files count epochs.

    Raises:
        ValueError: If the step is unknown, or several measurements would have the same one.
    """
    if step not in ("iteration", "epoch"):
        raise invalid_argument("step", "'iteration' or 'epoch'", f"step={step!r}")
    if step == "epoch" and update_freq != "epoch":
        raise invalid_argument("step", "'iteration' unless `update_freq` is 'epoch'", f"step={step!r}")
    return bool(step == "epoch")


def read_logs(logs: Any, plan: MeasurementPlan) -> str | tuple[str, ...] | None:
    """Returns the choice of the numbers in the logs; refuses names of what is not measured."""
    if logs in ("auto", "all", None):
        return logs
    measured = [quantity.key for quantity in plan.selection] + (["loss_gradient"] if plan.targets is not None else [])
    known = {name for key in measured for name in (key, key.removeprefix("joint/"), f"joint/{key}")}
    names = [logs] if isinstance(logs, str) or not isinstance(logs, Iterable) else list(logs)
    unknown = [name for name in names if name not in known]
    if unknown:
        hint = did_you_mean(unknown[0], measured)
        raise invalid_argument("logs", f"'auto', 'all', None or names out of {measured}", f"logs={logs!r}{hint}")
    return tuple(names)


def check_name(name: Any) -> None:
    """Refuses a name that cannot stand in keys and paths."""
    if name is not None and not (isinstance(name, str) and re.fullmatch(r"[A-Za-z0-9_.-]*[A-Za-z0-9_-]", name)):
        raise invalid_argument("name", "a string of letters, digits and `_.-`, or None", f"name={name!r}")
