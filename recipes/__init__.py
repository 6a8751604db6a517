"""Whole runs: a YAML file and the modules it names."""

import sys
from importlib import import_module
from types import ModuleType
from typing import Any

# Class paths in checkpoints and configurations that were written before each family of recipes had a folder.
_MOVED = {
    "answers": "rollouts",
    "arms": "compare.arms",
    "domains": "mixture_of_experts",
    "expert_picture": "mixture_of_experts",
    "fits": "compare.processes",
    "images": "image_classification",
    "language_models": "rollouts",
    "mixture": "mixture_of_experts",
    "policy": "rollouts",
    "prompts": "rollouts",
    "sft": "chat",
    "solve_picture": "rollouts",
    "tasks": "rollouts",
    "texts": "text_classification",
}


class _Moved(ModuleType):
    """A module under its old name."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # asked of every module by `inspect`
            raise AttributeError(name)
        module = import_module(f"{__name__}.{_MOVED[self.__name__.rpartition('.')[2]]}")
        return getattr(module, name)


for _name in _MOVED:
    sys.modules.setdefault(f"{__name__}.{_name}", _Moved(f"{__name__}.{_name}"))
