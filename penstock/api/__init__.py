"""What every engine shares: protocols, prompts, handles, channels, transcripts and callbacks.

An engine of any kind gives its callers the same experience by filling these. Imports no engine; consumers of an engine
(facades, server, command line) are written against the protocols here.
"""
