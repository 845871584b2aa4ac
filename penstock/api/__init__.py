"""The parts that every engine shares: protocols, prompts, handles, channels, transcripts and callbacks.

Never imports an engine. Engines of any kind use these parts to give callers the same behaviour; facades, server and
command line are written against the protocols here.
"""
