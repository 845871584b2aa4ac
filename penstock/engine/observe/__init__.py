"""Measurements of an engine: metrics, log events, statistics."""
