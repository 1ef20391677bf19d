"""Regularization: a measure of the Jacobians as a loss."""
