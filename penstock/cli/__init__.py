"""The command line: `penstock generate | chat | bench | doctor`. Importing it, and `--help`, load no model library."""

from penstock.cli.command import main

__all__ = ["main"]
