"""Evaluation of trained models: loss, perplexity and bits per byte over validation sets."""
