"""The rooms are importable under one top-level name, and the core needs no extra."""

import subprocess
import sys


def test_core_imports_without_the_extras():
    heavy = ["datasets", "faiss", "sklearn", "transformers", "wandb"]
    code = (
        "import sys, curation, curation.online, curation.callbacks;"
        f"bad = [m for m in {heavy!r} if m in sys.modules]; assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
