"""When a training is measured, and what becomes of a report."""
