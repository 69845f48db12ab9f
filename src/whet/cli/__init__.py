"""The command `whet`: it parses, calls a verb and prints what the verb returned."""

from whet.cli.app import app, main

__all__ = ["app", "main"]
