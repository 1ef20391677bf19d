"""Reports as TensorBoard event files."""
