"""Paged K/V bookkeeping: which block holds which tokens, and who shares it. Numbers only, never a tensor."""
