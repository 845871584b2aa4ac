"""The native engine: the loop that runs its steps, requests in and out, text, and measurements.

Importing it is cheap: torch and transformers are imported when a model is loaded.
"""
