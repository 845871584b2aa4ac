"""What makes the engine faster: model rewrites, speculation, tuning, and the presets; beam search beside them."""
