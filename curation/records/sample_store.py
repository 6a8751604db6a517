"""Preallocated columns with a row for every sample, the base of the records that grow while a model trains."""

from typing import Any, ClassVar

import torch
from torch import Tensor

from curation.checks import check_integer


class SampleStore:
    """Columns ``[N]`` by sample id, which are attributes. Equal updates on every rank give equal records.

    Nothing here synchronises with the host.

    Args:
        size: Number of samples, ``N``; ids are in [0, size).
        device: Device of the record.

    Attributes:
        columns: Name, dtype and first value of each column.

    Raises:
        ValueError: If ``size`` is no positive integer.
    """

    columns: ClassVar[dict[str, tuple[torch.dtype, float]]] = {}

    def __init__(self, size: int, device: torch.device | str = "cpu") -> None:
        check_integer("size", size, 1)
        self._size = size
        # One row more than samples, for the rows that have no id.
        self._rows = {
            name: torch.full((size + 1,), value, dtype=dtype, device=device)
            for name, (dtype, value) in self.columns.items()
        }
        for name, rows in self._rows.items():
            setattr(self, name, rows[:-1])

    def __len__(self) -> int:
        return self._size

    def places(self, ids: Tensor) -> Tensor:
        """Rows of the columns, int64 ``[B]``: the ids, and the row that is no sample's for -1.

        Raises:
            TypeError: If the ids are not int64.
            ValueError: If they are not ``[B]``, or an id is not in [-1, N) (checked on a CPU only).
        """
        if ids.dtype != torch.int64:
            raise TypeError(f"Argument `ids` must be int64, but got {ids.dtype}.")
        if ids.dim() != 1:
            raise ValueError(f"Argument `ids` must be [B], but got {list(ids.shape)}.")
        if ids.device.type == "cpu" and len(ids):  # elsewhere it would wait for the device
            wrong = ids[(ids < -1) | (ids >= len(self))].tolist()
            if wrong:
                raise ValueError(f"A sample id is {wrong[0]}, but the record is of {len(self)} samples.")
        return ids.where(ids >= 0, len(self))

    def state_dict(self) -> dict[str, Any]:
        """The columns."""
        return {name: getattr(self, name) for name in self.columns}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`.

        Raises:
            ValueError: If the state has another number of samples.
        """
        saved = len(next(iter(state.values())))
        if saved != len(self):
            raise ValueError(f"The record in the checkpoint is of {saved} samples, not {len(self)}.")
        for name, value in state.items():
            getattr(self, name).copy_(value)


def repeated(ids: Tensor) -> Tensor:
    """Whether an id has occurred before, bool ``[B]``."""
    ordered, order = ids.sort(stable=True)
    again = torch.zeros_like(ids, dtype=torch.bool)
    again[1:] = ordered[1:] == ordered[:-1]
    return torch.zeros_like(again).scatter(0, order, again)
