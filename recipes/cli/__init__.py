"""The ``curation`` command: every command is a thin file that calls functions."""
