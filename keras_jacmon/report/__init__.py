"""Reports of measurements: numbers, tables and verdicts, in plain NumPy."""
