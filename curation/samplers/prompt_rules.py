"""Which prompts of verifiable rewards are worth answers: rules on the memory of their outcomes.

Every rule is a function ``rule(memory, generator, *, must, progress, **own) -> ids``:

- ``memory``: a :class:`~curation.records.prompt_memory.PromptMemory` of ``N`` prompts on the CPU;
- ``generator``: a ``torch.Generator`` on the CPU, of the round;
- ``must``: bool ``[N]``, the prompts that are visited in any case, since nothing or nothing recent is known of them;
- ``progress``: share of the fit that is done, in [0, 1];
- ``ids``: int64 ``[n]``, distinct, at least one.

In every rule ``prune`` is the largest share of prompts without signal that a round leaves out, so that at least
``1 - prune`` of them are tested again.
"""

import numpy as np
import torch
from torch import Generator, Tensor

from curation.records.prompt_memory import PromptMemory
from curation.samplers.pruning_rules import lowest, subset


def streaks(
    memory: PromptMemory, generator: Generator, *, must: Tensor, progress: float, prune: float = 0.99
) -> Tensor:
    """GRESO (arXiv 2506.02177): the longer the streak of groups without signal, the rarer a prompt is visited.

    After ``e`` groups in a row that were all right a prompt is visited with probability
    ``max(explore[0] ** e, 1 - prune)``, after ``h`` that were all wrong with ``max(explore[1] ** h, 1 - prune)``.

    Args:
        memory: Of the prompts.
        generator: Of the round.
        must: bool ``[N]``.
        progress: Not used.
        prune: Largest probability to leave a prompt out, in [0, 1).

    Returns:
        Ids int64 ``[n]``; all prompts where none is drawn.
    """
    base = memory.explore.double()
    p = torch.minimum(base[0] ** memory.solved, base[1] ** memory.failed).clamp(min=1 - prune)
    visited = must | (torch.rand(len(memory), generator=generator, dtype=torch.float64) < p)
    return (visited if visited.any() else ~visited).nonzero().flatten()


def thompson(
    memory: PromptMemory,
    generator: Generator,
    *,
    must: Tensor,
    progress: float,
    prune: float = 0.5,
    target: float = 0.5,
    last_target: float | None = None,
) -> Tensor:
    """MoPPS (arXiv 2507.04632): the prompts whose draws from the posteriors of their pass rates are nearest a target.

    The posterior is ``Beta(1 + successes, 1 + trials - successes)``, for a group of one answer as for any other.

    Args:
        memory: Of the prompts.
        generator: Of the round.
        must: bool ``[N]``; these come first.
        progress: Moves the target.
        prune: Share of all prompts that is left out, in [0, 1).
        target: Pass rate at the beginning of the fit, in [0, 1].
        last_target: Pass rate at its end, to which the target moves in a line, as in a curriculum from easy to hard;
            None for ``target``.

    Returns:
        Ids int64 ``[max(1, N - floor(prune N))]``, more where more must be visited.
    """
    goal = target if last_target is None else target + (last_target - target) * progress
    successes, trials = memory.successes.double().numpy(), memory.trials.double().numpy()
    seed = int(torch.randint(2**63 - 1, (), generator=generator))
    drawn = np.random.default_rng(seed).beta(1 + successes, 1 + np.maximum(trials - successes, 0))
    distance = torch.from_numpy(np.abs(drawn - goal)).masked_fill(must, -1)
    n = max(1, len(memory) - int(prune * len(memory)), int(must.sum()))
    return lowest(distance, n).nonzero().flatten()


def drop_solved(
    memory: PromptMemory,
    generator: Generator,
    *,
    must: Tensor,
    progress: float,
    prune: float = 0.9,
    groups: int = 2,
) -> Tensor:
    """Leave out prompts whose last groups were all right; prompts that are too hard as yet stay.

    Args:
        memory: Of the prompts.
        generator: Of the round.
        must: bool ``[N]``.
        progress: Not used.
        prune: Share of the solved prompts that is left out, at random, in [0, 1).
        groups: Number of groups in a row that must have been all right, at least 1.

    Returns:
        Ids int64 ``[n]``.
    """
    done = (memory.solved >= groups) & ~must
    idle = done.nonzero().flatten()
    again = idle[subset(len(idle), len(idle) - int(prune * len(idle)), generator)]
    return torch.cat([(~done).nonzero().flatten(), again])


PROMPT_RULES = {"streaks": streaks, "thompson": thompson, "drop_solved": drop_solved}
