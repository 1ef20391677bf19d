"""Jacobians as linear operators; structured ones sum their entries without a matrix."""
