"""Reports: numbers, tables and verdicts, in plain NumPy."""
