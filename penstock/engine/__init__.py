"""The native engine: the loop that steps it, requests in and out, their text, and what is measured of it.

Importing it is light: torch and transformers are imported when a model is loaded.
"""
