"""The table of operations: one row for each, and a row is all that an operation needs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import tensorflow as tf
from helpers import FunctionCell

from keras_jacmon.cell.cell_graph import CellGraph
from keras_jacmon.cell.step import CellStep
from keras_jacmon.structure import ops
from keras_jacmon.structure.index_map import Node
from keras_jacmon.structure.interpreter import find_structure

if TYPE_CHECKING:
    import pytest

    from keras_jacmon.structure.structure import Structure


def structure_of_step(function: Any) -> Structure:
    cell, h = FunctionCell(function), tf.zeros((3, 4))
    cell.build((1, 5))
    return find_structure(CellGraph(CellStep(cell, [h]), tf.zeros((3, 5)), [h]))


def test_each_operation_of_tensorflow_has_one_row_at_most() -> None:
    assert len(ops.OPERATIONS) == len(ops.TABLE)
    for row in ops.TABLE:
        assert hasattr(tf.raw_ops, row.name), row.name


def test_rows_have_what_their_kind_needs() -> None:
    for row in ops.TABLE:
        assert (row.mover is not None) == (row.kind is ops.MOVES), row
        assert (row.keeps_points is not None) == (row.kind is ops.PRODUCT), row
        assert not row.passes or (row.kind is ops.ELEMENTWISE and row.derivative), row


def test_adding_an_elementwise_operation_is_adding_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def step(cell: Any, x: Any, h: Any) -> Any:
        return tf.math.softsign(x + h @ cell.U)

    row = ops.OPERATIONS["Softsign"]
    monkeypatch.delitem(ops.OPERATIONS, "Softsign")
    before = structure_of_step(step)
    assert "`Softsign` mixes units or points" in str(before.reason(0, Node.state(0)))
    assert not before.point_by_point
    monkeypatch.setitem(ops.OPERATIONS, "Softsign", row)
    after = structure_of_step(step)
    assert after.reason(0, Node.state(0)) is None
    assert after.describe(0, Node.state(0)).startswith("the product with")
    assert after.point_by_point
