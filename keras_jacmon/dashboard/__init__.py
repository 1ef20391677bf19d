"""Jacobian tab of TensorBoard, and the same page as one file."""
