"""The module that imports pyarrow when it is first used."""

import subprocess
import sys

import pyarrow
import pyarrow.compute
import pytest

from curation import arrow


def test_names_are_those_of_pyarrow():
    assert arrow.table is pyarrow.table
    assert arrow.compute is pyarrow.compute


@pytest.mark.parametrize("name", ["__wrapped__", "no_such_name"])
def test_other_names_are_refused_as_of_any_module(name):
    with pytest.raises(AttributeError, match=name):
        getattr(arrow, name)


def test_callbacks_are_imported_without_pyarrow():
    code = "import sys, curation.callbacks; sys.exit('pyarrow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
