"""The model and its probe: inputs, recurrent layers, and the tensors that each layer receives."""
