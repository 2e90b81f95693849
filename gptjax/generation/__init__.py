"""Text generation: the decode loop over a key-value cache, samplers, and ids turned into text as they come."""
