"""Speculation: who guesses the next tokens, how many guesses are worth a step, and how a step's results judge them."""
