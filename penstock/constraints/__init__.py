"""Grammars that restrict sampling: compiled for a tokenizer, matched along a sequence, turned into masks of tokens."""
