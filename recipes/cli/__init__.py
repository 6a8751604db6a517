"""The ``curation`` command: a file for each command, which parses arguments, calls functions and prints."""
