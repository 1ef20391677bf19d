"""The measurement of one call of a recurrent layer, from its inputs to its results."""
