"""gptjax trains GPTs in JAX and Flax, from a folder of text to a model that talks."""

__version__ = "0.1.0"
