"""A measure of the Jacobians as a loss."""
