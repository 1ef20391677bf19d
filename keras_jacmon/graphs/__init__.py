"""Functions of tensors as TensorFlow graphs: traced once, then run, read, or replayed in part."""
