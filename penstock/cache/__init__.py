"""Paged K/V bookkeeping: which block holds which tokens, and which sequences share it. Numbers only, never a tensor."""
