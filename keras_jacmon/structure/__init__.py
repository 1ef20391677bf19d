"""Structure of a cell's graph: its operations, its products and the independence of its samples."""
