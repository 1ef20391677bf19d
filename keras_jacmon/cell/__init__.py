"""One step of a cell as a graph, and the states that the cell visits."""
