"""The Jacobians `d s_t / d s_{t-1}` of a cell, and the checks that they rest on."""
