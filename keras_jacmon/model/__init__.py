"""The model and its probe: inputs, recurrent layers, and what each layer receives."""
