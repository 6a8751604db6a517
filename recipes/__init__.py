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
    "report": "compare.report compare.summary compare.pictures cli.report",
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
        for place in _MOVED[self.__name__.rpartition(".")[2]].split():
            module = import_module(f"{__name__}.{place}")
            if name in vars(module):
                return vars(module)[name]
        raise AttributeError(f"{self.__name__} has moved, and {name!r} is not among what it had")


for _name in _MOVED:
    sys.modules.setdefault(f"{__name__}.{_name}", _Moved(f"{__name__}.{_name}"))
