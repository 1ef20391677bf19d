"""Are the options of a meter in range? Asked before there is a model."""

from collections.abc import Iterable

import numpy as np

from keras_jacmon.measures.registry import select_measures


def check_options(
    *,
    measures: Iterable[str] | str | None = None,
    seed: int = 0,
    tolerance: float = 1e-2,
    max_rows: int | None = None,
    spectra: int = 1,
    warm_start: bool = False,
    flow_vectors: int = 2,
    exact_flow: bool = False,
    exponents: int = 1,
    warmup: int | None = None,
    qr_every: int = 1,
    shard_probe: bool = False,
    max_bytes: int = 1,
    max_entries: int = 0,
) -> None:
    """Checks what can be checked without a model.

    Raises:
        ValueError: If a value is out of range.
    """
    select_measures(measures)
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)):
        raise ValueError(f"Invalid value for argument `seed`. Expected an integer. Received: seed={seed!r}")
    if not 0 <= tolerance < 1:
        raise ValueError(
            "Invalid value for argument `tolerance`. Expected a relative tolerance from 0 up to, not including, 1. "
            f"Received: tolerance={tolerance}"
        )
    if max_rows is not None and max_rows < 1:
        raise ValueError(
            "Invalid value for argument `max_rows`. Expected a positive integer, or None for all. Received: "
            f"max_rows={max_rows}"
        )
    for name, switch in (("warm_start", warm_start), ("exact_flow", exact_flow), ("shard_probe", shard_probe)):
        if not isinstance(switch, bool):
            raise ValueError(
                f"Invalid value for argument `{name}`. Expected True or False. Received: {name}={switch!r}"
            )
    if warm_start and shard_probe:
        raise ValueError(
            "Invalid value for argument `warm_start`. Expected False with `shard_probe=True`, since no replica keeps "
            "vectors of its own. Received: warm_start=True"
        )
    for name, value, least in (
        ("spectra", spectra, 1),
        ("flow_vectors", flow_vectors, 2),
        ("exponents", exponents, 1),
        ("warmup", warmup or 0, 0),
        ("qr_every", qr_every, 1),
        ("max_bytes", max_bytes, 1),
        ("max_entries", max_entries, 0),
    ):
        if value < least:
            raise ValueError(
                f"Invalid value for argument `{name}`. Expected an integer of at least {least}. Received: "
                f"{name}={value}"
            )
