"""From text to batches: sources, prepared corpora, packing."""
