"""``curation doctor``: versions, devices, W&B and disk, on a page to paste into a report, without keys."""

import argparse
import netrc
import os
import platform
import re
import shutil
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from urllib.parse import urlparse

PACKAGE = "lightning-curation"
CORE = ("torch", "lightning", "torchmetrics", "numpy", "pyarrow")


def main(args: list[str]) -> None:
    """``curation doctor``."""
    argparse.ArgumentParser("curation doctor", description=__doc__).parse_args(args)
    print(page())


def page() -> str:
    """What a report of a fault needs, a line for each subject; ``~`` stands for the home directory."""
    lines = {
        PACKAGE: f"{_version(PACKAGE)}, in {Path(__file__).parents[2]}",
        "python": f"{platform.python_version()}, in {sys.prefix}",
        "system": platform.platform(),
        "packages": ", ".join(f"{name} {_version(name)}" for name in CORE),
        **{f"extra {name}": state for name, state in extras().items()},
        "devices": devices(),
        "W&B": wandb_state(),
        "hub": f"HF_HUB_OFFLINE {os.environ.get('HF_HUB_OFFLINE', 'not set')}",
        **{f"disk {name}": _free(folder) for name, folder in (("here", Path.cwd()), ("temp", tempfile.gettempdir()))},
    }
    width = max(map(len, lines))
    return without_home("\n".join(f"{name:{width}}  {text}" for name, text in lines.items()))


def without_home(text: str) -> str:
    """A text in which ``~`` stands for the home directory."""
    home = str(Path.home())
    return text if home == os.sep else re.sub(rf"{re.escape(home)}(?=[/\\\s:,]|$)", "~", text, flags=re.MULTILINE)


def extras() -> dict[str, str]:
    """For each extra of the package ``"all there"``, or what it lacks."""
    from packaging.requirements import Requirement

    lacking: dict[str, list[str]] = {}
    for text in requires(PACKAGE) or []:
        need = Requirement(text)
        extra = re.search(r"extra == [\"']([^\"']+)", text)
        if extra is None or need.name == PACKAGE:
            continue
        missing = lacking.setdefault(extra[1], [])
        there = _version(need.name)
        if there == "missing" or not need.specifier.contains(there, prereleases=True):
            missing.append(f"{need.name}{need.specifier} ({there})")
    return {name: f"lacks {', '.join(missing)}" if missing else "all there" for name, missing in lacking.items()}


def devices() -> str:
    """The cores, the threads of torch, and the accelerators that torch can use."""
    import torch

    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    names += ["MPS"] if torch.backends.mps.is_available() else []
    cores = f"{os.cpu_count()} {platform.machine()} cores, {torch.get_num_threads()} threads of torch"
    return f"{cores}; {', '.join(names) or 'no GPU'} (CUDA of torch: {torch.version.cuda or 'none'})"


def wandb_state() -> str:
    """Whether W&B is installed, its mode, and whether a key is known; the key itself is not read out."""
    if _version("wandb") == "missing":
        return "not installed"
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        file = os.environ.get("NETRC") or next(
            f for f in (Path.home() / ".netrc", Path.home() / "_netrc") if f.is_file()
        )
        known = netrc.netrc(str(file)).authenticators(host) is not None
    except (StopIteration, OSError, netrc.NetrcParseError):
        known = False
    known = known or bool(os.environ.get("WANDB_API_KEY"))
    mode = os.environ.get("WANDB_MODE", "not set (online)")
    return f"{_version('wandb')}, WANDB_MODE {mode}, {'logged in' if known else 'not logged in'}"


def _version(package: str) -> str:
    """The version of an installed package, or ``"missing"``."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "missing"


def _free(folder: str | Path) -> str:
    """The space that is free on the disk of a folder."""
    usage = shutil.disk_usage(folder)
    return f"{usage.free / 1e9:.0f} of {usage.total / 1e9:.0f} GB free, in {folder}"
