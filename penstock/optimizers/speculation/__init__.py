"""Speculation: drafters, how many draft tokens to put into a step, and the verification of their draft tokens."""
