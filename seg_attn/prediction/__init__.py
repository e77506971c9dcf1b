"""How photographs become masks: settings, tiles, inputs, writers, and the stream that joins them."""
