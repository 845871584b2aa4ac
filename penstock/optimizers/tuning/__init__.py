"""Tuning: the limits of a step, adjusted to measured step times toward a declared goal."""
