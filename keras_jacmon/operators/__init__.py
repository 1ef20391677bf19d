"""Jacobians as linear operators, with products and sums of entries that need no matrix."""
