"""Configurations as YAML that reads back as what was written, strings that look like numbers included.

PyYAML writes the string ``12e5`` without quotes, since YAML 1.1 has no such number; the parser of Lightning's command
line takes it for 1200000.0.
"""

import re
from typing import Any

import yaml

MODE = "curation"  # the parser mode that writes with `dump`
_FLOAT = re.compile(r"[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$")  # what the parser reads as one beyond PyYAML


class _Dumper(yaml.SafeDumper):
    """Quotes every string that the parser would read as a number."""


_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789"))


def dump(config: Any) -> str:
    """A configuration as YAML, in its own order.

    Example:
        >>> print(dump({"revision": "12e5", "lr": 1e-05}), end="")
        revision: '12e5'
        lr: 1.0e-05
    """
    return yaml.dump(config, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def register_mode() -> None:
    """Make ``MODE`` known to the parser: it reads YAML as ever, and writes it with :func:`dump`."""
    from jsonargparse import get_loader, set_dumper, set_loader

    set_loader(MODE, get_loader("yaml"), exceptions=(yaml.YAMLError,))
    set_dumper(MODE, dump)
