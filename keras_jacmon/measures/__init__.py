"""Measures: how large a Jacobian is."""
