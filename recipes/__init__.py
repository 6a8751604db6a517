"""Whole runs: a YAML file and the modules it names."""
