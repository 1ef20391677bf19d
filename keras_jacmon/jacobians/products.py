"""Which operations multiply each row by a kernel?"""

import tensorflow as tf

PRODUCTS = frozenset({"MatMul", "BatchMatMulV2", "BatchMatMulV3", "Einsum", "Conv2D", "Conv3D"})


def is_row_by_row(operation: tf.Operation, first: bool, rank: int, output_rank: int) -> bool:  # noqa: FBT001
    """Whether row r of the product is made from row r of the operand, which is the first or the second one."""
    if operation.type == "MatMul":
        return first and not operation.get_attr("transpose_a")
    if operation.type.startswith("BatchMatMul"):
        # From rank 3 on, the first axis only counts the products.
        plain = len(operation.outputs[0].shape) == len("ij")
        return first and not operation.get_attr("adj_x") if plain else output_rank == rank
    if operation.type == "Einsum":
        left, result = operation.get_attr("equation").decode().replace(" ", "").split("->")
        parts = left.split(",")
        if len(parts) == 1:
            return False
        own, other = parts if first else parts[::-1]
        if "..." in own or "..." in other:
            return own.startswith("...") and result.startswith("...") and "..." not in other
        return own[:1] == result[:1] and own[:1] not in other and own.count(own[0]) == 1
    return first
