"""How evenly the experts of a mixture are used, and how their use depends on the domain."""

import math
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from curation.checks import check_integer
from curation.experts.load_balancing import expert_counts


class ExpertLoad(Metric):
    """How far the use of experts is from even.

    With ``f_i`` the fraction of the choices that fell on expert ``i`` of ``E``:

    - ``max_load``: ``E max f``, 1 where all experts are used alike and ``E`` where one is always chosen;
    - ``dead``: the fraction of experts that were never chosen;
    - ``entropy``: ``-sum f log2 f``, in bits; ``log2 E`` where all experts are used alike.

    Args:
        experts: Number of experts ``E``.
        **kwargs: Options of :class:`torchmetrics.Metric`.

    Raises:
        ValueError: If ``experts`` is not a positive integer.

    Example:
        >>> metric = ExpertLoad(4)
        >>> metric.update(torch.tensor([[0, 1], [0, 3], [0, 1], [0, 1]]))
        >>> {name: round(value.item(), 3) for name, value in metric.compute().items()}
        {'max_load': 2.0, 'dead': 0.25, 'entropy': 1.406}
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False
    counts: Tensor

    def __init__(self, experts: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.experts = check_integer("experts", experts, 1)
        self.add_state("counts", torch.zeros(self.experts, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, indices: Tensor) -> None:
        """Count choices.

        Args:
            indices: int64 ``[N, k]``, the experts of each token; -1 for none.
        """
        # Not in place: a state may have been made in inference mode.
        self.counts = self.counts + expert_counts(indices, self.experts)

    def compute(self) -> dict[str, Tensor]:
        """The three values, fp32 scalars; NaN load and entropy where nothing was chosen."""
        f = self.counts.double() / self.counts.sum()
        return {
            "max_load": (self.experts * f.max()).float(),
            "dead": self.counts.eq(0).float().mean(),
            "entropy": _entropy(f).float(),
        }


class ExpertSpecialization(Metric):
    r"""How much the domain of a token says about its experts.

    With the number of choices ``n_{d,i}`` of expert ``i`` by tokens of domain ``d``, their fractions

    .. math:: f_{d,i} = \frac{n_{d,i}}{\sum_j n_{d,j}}

    and the fractions ``f_i`` of all domains together:

    - ``frequencies``: ``f_d``;
    - ``divergence``: ``KL(f_d || f)`` of each domain, in bits;
    - ``information``: the mutual information of domain and expert, in bits: the mean divergence, where each domain
      weighs as many choices as it has. 0 where all domains use the experts alike; at most ``log2 min(D, E)``.

    Args:
        domains: Number of domains ``D``.
        experts: Number of experts ``E``.
        **kwargs: Options of :class:`torchmetrics.Metric`.

    Raises:
        ValueError: If ``domains`` or ``experts`` is not a positive integer.

    Example:
        >>> metric = ExpertSpecialization(domains=2, experts=4)
        >>> metric.update(torch.tensor([[0, 1], [1, 0], [1, 2], [2, 1]]), torch.tensor([0, 0, 1, 1]))
        >>> values = metric.compute()
        >>> values["frequencies"].tolist()
        [[0.5, 0.5, 0.0, 0.0], [0.0, 0.5, 0.5, 0.0]]
        >>> values["information"], values["divergence"]
        (tensor(0.5000), tensor([0.5000, 0.5000]))
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False
    counts: Tensor

    def __init__(self, domains: int, experts: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        shape = check_integer("domains", domains, 1), check_integer("experts", experts, 1)
        self.add_state("counts", torch.zeros(shape, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, indices: Tensor, domains: Tensor) -> None:
        """Count choices.

        Args:
            indices: int64 ``[N, k]``, the experts of each token; -1 for none.
            domains: int64 ``[N]``, the domain of each token.
        """
        chosen = (indices >= 0).long()
        cells = (domains[:, None].expand_as(indices), indices.clamp(min=0))
        self.counts = self.counts + torch.zeros_like(self.counts).index_put(cells, chosen, accumulate=True)

    def compute(self) -> dict[str, Tensor]:
        """``frequencies`` ``[D, E]``, ``divergence`` ``[D]``, ``information``; fp32, NaN where nothing was chosen."""
        counts = self.counts.double()
        choices = counts.sum(1)
        f_d, f = counts / choices[:, None], counts.sum(0) / counts.sum()
        divergence = (-_entropy(f_d) - torch.xlogy(f_d, f).sum(1) / math.log(2)).clamp(
            min=0
        )  # rounding may give less
        weighted = divergence.masked_fill(choices == 0, 0) * choices / counts.sum()
        return {
            "frequencies": f_d.float(),
            "divergence": divergence.float(),
            "information": weighted.sum().float(),
        }


def _entropy(f: Tensor) -> Tensor:
    """Entropy in bits over the last dimension."""
    return torch.special.entr(f).sum(-1) / math.log(2)
