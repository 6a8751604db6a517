"""What is remembered of every prompt of verifiable rewards: a decayed pass rate, streaks and the last visit."""

from os import PathLike
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from curation.checks import check_integer, check_number
from curation.records.sample_store import SampleStore, repeated
from curation.tables import read_table, write_table


class PromptMemory(SampleStore):
    """Outcomes of the groups of answers to every prompt; 28 bytes a prompt.

    A group of ``n`` answers of which ``k`` are right (the sum of its rewards) turns the counts ``S, T`` of its prompt
    into ``decay S + k`` and ``decay T + n``. So ``Beta(1 + S, 1 + T - S)`` is the posterior of the pass rate of MoPPS
    (arXiv 2507.04632), and ``S / T`` its decayed mean. Nothing here synchronises with the host.

    Args:
        size: Number of prompts, ``N``; ids are in [0, size).
        device: Device of the memory.
        decay: Factor in [0, 1] by which the groups before count less with every group.
        right: Largest share of wrong answers of a group that is all right, in [0, 1).
        wrong: Least share of wrong answers of a group that is all wrong, in (0, 1]. (GRESO, arXiv 2506.02177, has .02
            and .89; with .89 one right answer of 16, which has an advantage, is none.)

    Attributes:
        successes: fp32 ``[N]``, ``S``, decayed sum of rewards.
        trials: fp32 ``[N]``, ``T``, decayed number of answers.
        solved: int32 ``[N]``, how many groups in a row, the last included, were all right.
        failed: int32 ``[N]``, how many were all wrong.
        visits: int32 ``[N]``, number of groups.
        last: int64 ``[N]``, the step of the last group; -1 before the first.
        explore: fp32 ``[2]``, the base of the probability to visit a prompt after a streak of right, and of wrong
            groups (GRESO); moved by :meth:`adapt`.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> memory = PromptMemory(3)
        >>> memory.update(torch.tensor([0, 2]), torch.tensor([0.0, 0.25]), answers=8, step=0)
        >>> memory.rate, memory.solved
        (tensor([1.0000,    nan, 0.7500]), tensor([1, 0, 0], dtype=torch.int32))
    """

    columns: ClassVar = {
        "successes": (torch.float32, 0.0),
        "trials": (torch.float32, 0.0),
        "solved": (torch.int32, 0),
        "failed": (torch.int32, 0),
        "visits": (torch.int32, 0),
        "last": (torch.int64, -1),
    }
    successes: Tensor
    trials: Tensor
    solved: Tensor
    failed: Tensor
    visits: Tensor
    last: Tensor

    def __init__(
        self,
        size: int,
        device: torch.device | str = "cpu",
        decay: float = 0.5,
        right: float = 0.02,
        wrong: float = 0.98,
    ) -> None:
        super().__init__(size, device)
        self.decay: float = check_number("decay", decay, "[0, 1]")
        self.right: float = check_number("right", right, "[0, 1)")
        self.wrong: float = check_number("wrong", wrong, "(0, 1]")
        if right >= wrong:
            raise ValueError(f"Argument `right` must be below `wrong`, {wrong}, but got {right!r}.")
        self.explore = torch.full((2,), 0.5, dtype=torch.float32, device=device)

    @property
    def rate(self) -> Tensor:
        """The decayed pass rate of every prompt, fp32 ``[N]``; NaN before its first group."""
        return self.successes / self.trials

    def update(self, ids: Tensor, shares: Tensor, answers: int, step: int) -> None:
        """Add a group of answers to each of some prompts; of an id that occurs twice the first row.

        Args:
            ids: int64 ``[B]`` in [0, N); rows with the id -1 are left out.
            shares: fp32 ``[B]`` in [0, 1], the share of wrong answers; rows that are NaN are left out.
            answers: Number of answers of a group.
            step: The step of the groups.

        Raises:
            TypeError: If the ids are not int64.
            ValueError: If the shapes differ, an id is not in [-1, N) (checked on a CPU only), or a number is out of
                its range.
        """
        check_integer("answers", answers, 1)
        check_integer("step", step, 0)
        if shares.shape != ids.shape:
            raise ValueError(f"Argument `shares` must be {list(ids.shape)}, but got {list(shares.shape)}.")
        known = shares.isfinite() & ~repeated(ids)
        at, shares = self.places(ids).where(known, len(self)), shares.where(known, 0.5)
        rows = self._rows
        rows["successes"][at] = self.decay * rows["successes"][at] + answers * (1 - shares)
        rows["trials"][at] = self.decay * rows["trials"][at] + answers
        rows["solved"][at] = torch.where(shares <= self.right, rows["solved"][at] + 1, 0)
        rows["failed"][at] = torch.where(shares >= self.wrong, rows["failed"][at] + 1, 0)
        rows["visits"][at] = rows["visits"][at] + 1
        rows["last"].index_fill_(0, at, step)

    def adapt(self, shares: Tensor, target: float, by: float) -> None:
        """Move :attr:`explore` after a step, towards a share of groups without signal (GRESO, algorithm 1).

        A third of the target may be all right, the rest all wrong; each base falls by ``by`` where more were, and
        rises where fewer were, within [.05, .95].

        Args:
            shares: fp32 ``[B]``, the share of wrong answers of every group of the step; NaN where there is none.
            target: Share of the groups, in [0, 1].
            by: How far, >= 0.
        """
        known = shares.isfinite().sum().clamp(min=1)
        silent = torch.stack([(shares <= self.right).sum(), (shares >= self.wrong).sum()]) / known
        goal = torch.arange(1, 3, device=silent.device) * (target / 3)
        self.explore = (self.explore + torch.where(silent >= goal, -by, by).float()).clamp(0.05, 0.95)

    def to(self, device: torch.device | str) -> "PromptMemory":
        """The same memory on a device: itself, or a copy."""
        if self._rows["last"].device == torch.device(device):
            return self
        moved = PromptMemory(len(self), device, self.decay, self.right, self.wrong)
        moved.load_state_dict(self.state_dict())
        return moved

    def state_dict(self) -> dict[str, Any]:
        """The columns, and what streaks are explored with."""
        return {**super().state_dict(), "explore": self.explore}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`.

        Raises:
            ValueError: If the state has another number of prompts.
        """
        super().load_state_dict({name: state[name] for name in self.columns})
        self.explore = state["explore"].to(self.explore.device, copy=True)

    def save(self, path: str | PathLike[str], prompts: str = "", settings: str = "", **more: Any) -> None:
        """Write a Parquet file with a row for each prompt; the file is replaced as a whole.

        Args:
            path: The file.
            prompts: What tells these prompts from others, such as a checksum of their texts.
            settings: How the outcomes were made, for a reader.
            more: Further columns ``[N]`` by name.

        Raises:
            OSError: If the file cannot be written.
        """
        columns = {name: getattr(self, name).cpu().numpy() for name in self.columns}
        columns = {"prompt": np.arange(len(self)), "pass_rate": self.rate.cpu().numpy(), **columns, **more}
        explore = " ".join(map(str, self.explore.tolist()))
        write_table(path, columns, {"prompts": prompts, "settings": settings, "explore": explore})

    def read(self, path: str | PathLike[str], prompts: str = "") -> Any:
        """Take over a file of :meth:`save`.

        Args:
            path: The file.
            prompts: As the argument of :meth:`save`; compared where both are known.

        Returns:
            The whole table, a ``pyarrow.Table``.

        Raises:
            ValueError: If there is no such file, it is damaged or another, or of other prompts.
        """
        try:
            table = read_table(path)
            texts = {key.decode(): value.decode() for key, value in (table.schema.metadata or {}).items()}
            state: dict[str, Any] = {n: torch.from_numpy(table[n].to_numpy().copy()) for n in self.columns}
            state["explore"] = torch.tensor([float(x) for x in texts["explore"].split()], dtype=torch.float32)
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(
                f"Argument `path` must be a file of `PromptMemory`, but got {str(path)!r}: {error}"
            ) from error
        if table.num_rows != len(self) or (prompts and texts["prompts"] and prompts != texts["prompts"]):
            raise ValueError(
                f"The memory in {str(path)!r} is of other prompts: it has {table.num_rows} of {texts['prompts']!r}, "
                f"and here are {len(self)} of {prompts!r}."
            )
        self.load_state_dict(state)
        return table
