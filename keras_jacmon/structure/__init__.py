"""What the graph of a cell is made of."""
