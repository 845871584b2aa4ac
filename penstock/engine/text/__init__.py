"""Text to tokens and tokens to text: tokenizing, detokenizing, stop strings."""
