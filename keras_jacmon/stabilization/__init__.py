"""Weights that start at a chosen size of the Jacobians."""
