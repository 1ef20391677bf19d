"""Jacobians as linear operators: what can be computed of them without forming them."""
