"""Watching a run from outside: in the terminal, as a web page, as JSON. Loads no torch."""
