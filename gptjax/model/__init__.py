"""The decoder as plain maths: declarations, forward pass, cache, muP and parameter counts. Asks for no device."""
