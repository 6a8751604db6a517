"""What every test shares: no network, no W&B server, and nothing left behind in the process."""

import gc
import os
import sys
from functools import cache

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"
os.environ["WANDB_SILENT"] = "true"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch
from hypothesis import settings

# A slow machine is no failure. CI tries the same inputs each time; new ones are for those who can look at them.
settings.register_profile("untimed", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("untimed")
LONG = ("test_compare.py", "real_model", "test_five_steps", "killed_mid_epoch", "types_of_every")
torch.set_num_threads(1)  # what most tests train is so small that a second one costs more than it gives


@pytest.fixture(autouse=True)
def no_open_run():
    """A W&B run that a test leaves open would take what the next one logs."""
    yield
    if "wandb" in sys.modules and sys.modules["wandb"].run is not None:
        sys.modules["wandb"].finish()


@pytest.fixture(autouse=True)
def no_environment_leak():
    before = dict(os.environ)
    yield
    changed = {k for k in before.keys() | os.environ.keys() if before.get(k) != os.environ.get(k)}
    # Lightning, DDP, W&B and scikit-learn keep these on purpose.
    allowed = {"PL_GLOBAL_SEED", "PL_SEED_WORKERS", "MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK"}
    allowed |= {
        "WORLD_SIZE",
        "PYTEST_CURRENT_TEST",
        "RANK",
        "PYTORCH_NVML_BASED_CUDA_CHECK",
        "CUDA_DEVICE_ORDER",
        "TORCHINDUCTOR_CACHE_DIR",
        "KMP_INIT_AT_FORK",
        "KMP_DUPLICATE_LIB_OK",
    }
    leaked = {k for k in changed - allowed if not k.startswith("WANDB_")}
    assert not leaked, f"left in the environment: {leaked}"


def pytest_collection_modifyitems(items):
    """Long tests come first."""
    items.sort(key=lambda item: not any(name in item.nodeid for name in LONG))


def pytest_collection_finish():
    """What was imported is not looked through again whenever garbage is collected, as Lightning's tuners do."""
    gc.collect()
    gc.freeze()


@cache
def has_shared_fixtures(file):
    return 'scope="module"' in file.read_text()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """The tests of a file with fixtures of its module run in one process, which makes them once.

    pytest-xdist's own ``--dist loadgroup`` groups nothing with pytest 9.2, where names of tests cannot be changed.
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByFixtures(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            file = nodeid.partition("::")[0]
            return file if has_shared_fixtures(config.rootpath / file) else nodeid

    return ByFixtures(config, log)


@pytest.fixture
def gguf_read_once(monkeypatch):
    """A model's file is read once; transformers reads it for the configuration, for the words and for the weights."""
    gguf = pytest.importorskip("gguf", reason="needs gguf, from the [demo] extra")
    for name in ("GGUFReader", "get_tensor_name_map"):
        monkeypatch.setattr(gguf, name, once(getattr(gguf, name)))


@cache
def once(function):
    return cache(function)
