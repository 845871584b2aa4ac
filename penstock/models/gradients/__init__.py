"""Log probabilities with gradients through a caller's live module, packed without padding."""
