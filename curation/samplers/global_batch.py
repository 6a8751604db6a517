"""What samplers share that choose a batch of all processes together."""

from typing import Any

import torch
from torch.utils.data import DistributedSampler


class GlobalBatchSampler(DistributedSampler):
    """A distributed sampler that Lightning leaves alone, of one process in its eyes; a process takes its part itself.

    Args:
        samples: Anything with a length.
        seed: Of the order.
    """

    def __init__(self, samples: Any, seed: int) -> None:
        super().__init__(samples, num_replicas=1, rank=0, seed=seed)

    @property
    def _place(self) -> tuple[int, int]:
        """Rank and processes. Asked for late: the process group may come after the sampler."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return torch.distributed.get_rank(), torch.distributed.get_world_size()
        return 0, 1
