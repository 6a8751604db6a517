#!/usr/bin/env bash
# jsonargparse 4.53.0: a quoted string of a YAML file becomes a number where the type is a union of a number and a string.
# YAML says that "007", "0x10", "1_000" and "12e5" in quotes are strings. For an argument of the type `int | str` or
# `float | str` the parser reads the text once more and takes the first type of the union that fits, so identifiers lose
# their zeros and a name such as "12e5" is 1200000.0. With `str | int` they stay. The documentation says that the types of
# a union are tried in order, not that a string is read again.
# Seen: "7 16 1000 1200000.0 str first: '007'".
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q jsonargparse==4.53.0
cd "$folder"
cat > names.yaml <<'YAML'
a: "007"
b: "0x10"
c: "1_000"
d: "12e5"
first: "007"
YAML
"$folder/venv/bin/python" - <<'PYTHON'
from jsonargparse import ArgumentParser

parser = ArgumentParser()
parser.add_argument("--names", action="config")
for name in "abc":
    parser.add_argument(f"--{name}", type=int | str)
parser.add_argument("--d", type=float | str)
parser.add_argument("--first", type=str | int)
read = parser.parse_args(["--names=names.yaml"])
print(read.a, read.b, read.c, read.d, f"str first: {read.first!r}", sep=" ")
assert [read.a, read.b, read.c, read.d, read.first] == [7, 16, 1000, 1200000.0, "007"]
PYTHON
