"""Rewrites of a loaded model that make it faster: verified, listed by name, each one optional."""
