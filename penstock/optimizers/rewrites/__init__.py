"""Rewrites of a loaded model that make it faster: each pass is verified, listed by name, and optional."""
