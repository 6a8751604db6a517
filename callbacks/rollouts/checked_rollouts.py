"""The rollouts that a module's ``rollout(batch, counts)`` returns: what they must be, and how many succeeded."""

from typing import Any

import numpy as np
from torch import Tensor

ROUNDING = 1e-6  # a reward this far out of [0, 1] counts as 0 or 1


def prompt_index(rollouts: Any) -> Any:
    """The row of the batch that each rollout answers, int64 ``[R]``; ``prompts`` is the older name."""
    return rollouts.prompt_index if hasattr(rollouts, "prompt_index") else rollouts.prompts


def check_rollouts(rollouts: Any, counts: np.ndarray) -> Any:
    """Refuse rollouts that are not what was asked for.

    Args:
        rollouts: What the module returned.
        counts: int64 ``[P]``, the number of rollouts that each prompt was to get.

    Returns:
        The rollouts.

    Raises:
        ValueError: If a prompt has another number of rollouts than ``counts`` says, or a reward is out of
            [0, 1] by more than rounding (1e-6).
        TypeError: If there is no ``rewards``, ``prompt_index`` or ``pool``, or the first two are not tensors.
    """
    has_index = hasattr(rollouts, "prompt_index") or hasattr(rollouts, "prompts")
    for name in ("rewards", "prompt_index", "pool"):
        if not (has_index if name == "prompt_index" else hasattr(rollouts, name)):
            raise TypeError(f"`rollout` must give an object with `{name}`, but gave {type(rollouts).__name__}.")
    for name, value in (("rewards", rollouts.rewards), ("prompt_index", prompt_index(rollouts))):
        if not isinstance(value, Tensor):
            raise TypeError(f"`rollout(...).{name}` must be a tensor, but is {type(value).__name__}.")
    rewards, index = rollouts.rewards.cpu(), prompt_index(rollouts).cpu()
    expected = np.arange(len(counts)).repeat(counts)
    if not (rewards.shape == index.shape == expected.shape and np.array_equal(index.sort().values, expected)):
        raise ValueError(
            f"`rollout` was asked for {counts.tolist()} rollouts of the prompts 0 to {len(counts) - 1}, but gave "
            f"{list(rewards.shape)} rewards of the prompts {list(index.shape)}, not as many of each."
        )
    outside = rewards[~((rewards >= -ROUNDING) & (rewards <= 1 + ROUNDING))]
    if len(outside):
        raise ValueError(f"`rollout(...).rewards` must be in [0, 1], but has {float(outside[0])}.")
    return rollouts


def successes(rollouts: Any, prompts: int) -> np.ndarray:
    """The sum of the rewards of each prompt's rollouts: fp64 ``[P]``.

    Args:
        rollouts: Rollouts that :func:`check_rollouts` accepts.
        prompts: ``P``, the number of prompts of the batch.
    """
    rewards = rollouts.rewards.double().clamp(0, 1).cpu().numpy()
    return np.bincount(prompt_index(rollouts).cpu().numpy(), rewards, prompts)
