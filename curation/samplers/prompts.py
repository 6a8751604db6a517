"""Rounds of prompts of verifiable rewards: a memory of all outcomes says which are worth answers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from curation.checks import check_integer, check_number, check_path
from curation.records.prompt_memory import PromptMemory
from curation.samplers.dynamic_pruning import DynamicDataPruningSampler, of_samples
from curation.samplers.prompt_rules import PROMPT_RULES


class PromptSampler(DynamicDataPruningSampler):
    """Draws rounds of the prompts that a memory of their outcomes says are worth answers, before any is generated.

    A :class:`DynamicDataPruningSampler` whose losses are the shares of wrong answers, which ``training_step`` leaves
    in ``self.sample_losses``, and whose rules know more of a prompt than its last share
    (:class:`~curation.records.prompt_memory.PromptMemory`): 48 bytes a prompt in all. Batches are full across rounds,
    so a step has as many prompts, of which more have signal.

    Args:
        dataset: The prompts, or anything else with their number. Its ``fingerprint``, a text, where it has one, is
            compared with that of a memory that is read.
        batch_size: Prompts of a batch, per process.
        rule: ``"streaks"`` (GRESO), ``"thompson"`` (MoPPS), ``"drop_solved"``, or a function of the same form
            (:mod:`curation.samplers.prompt_rules`), such as ``partial(thompson, target=0.7)``.
        answers: Number of answers to a prompt, by which a group counts in the posterior.
        prune: Largest share of prompts that a round leaves out, in [0, 1), see the rule; None for the rule's own.
        decay: Factor in [0, 1] by which the groups before count less with every group.
        start: File of a memory to begin with, of :meth:`PromptMemory.save` or ``curation rollouts profile``; None
            visits every prompt first.
        right: Largest share of wrong answers of a group that is all right.
        wrong: Least share of wrong answers of a group that is all wrong.
        silent: Share of groups without signal that ``streaks`` aims at, in [0, 1].
        anneal: Progress of the fit, in [0, 1], from which rounds visit every prompt.
        max_age: Number of rounds in a row after which a prompt that was left out is visited; None for no limit.
        review: Share of the prompts, at random, that every round visits in any case, in [0, 1].
        seed: Seed of the rounds, in [0, 2^63); equal on all ranks.

    Attributes:
        memory: What is remembered of the prompts.
        steps_trained: Number of steps whose outcomes are in it, of this fit.

    Raises:
        ValueError: If an argument has the wrong type or is out of its range, or ``start`` is of other prompts.

    Example:
        >>> import torch
        >>> sampler = PromptSampler(range(4), batch_size=2, rule="drop_solved", prune=0.9)
        >>> for _ in sampler:  # answers to 0 and 1 are always right
        ...     if len(sampler._drawn):
        ...         sampler.trained((sampler.next.ids > 1) * 0.5)
        >>> sampler.memory.solved.tolist()
        [1, 1, 0, 0]
    """

    rules: ClassVar = PROMPT_RULES
    memory: PromptMemory

    def __init__(
        self,
        dataset: Any,
        batch_size: int,
        rule: str | Callable[..., Any] = "streaks",
        answers: int = 8,
        prune: float | None = None,
        decay: float = 0.5,
        start: str | Path | None = None,
        right: float = 0.02,
        wrong: float = 0.98,
        silent: float = 0.25,
        anneal: float = 1.0,
        max_age: int | None = None,
        review: float = 0.0,
        seed: int = 0,
    ) -> None:
        self.answers: int = check_integer("answers", answers, 1)
        self.decay, self.right, self.wrong = decay, right, wrong
        self.silent: float = check_number("silent", silent, "[0, 1]")
        self.start = check_path("start", start, optional=True)
        super().__init__(dataset, batch_size, rule, prune, anneal, max_age, review, 0.0, seed)

    @property
    def fingerprint(self) -> str:
        """What tells the prompts from others; empty where that is not known."""
        return getattr(self.dataset, "fingerprint", "")

    def reset(self) -> None:
        """Forget every outcome but those of ``start``."""
        super().reset()
        self.memory = PromptMemory(self.size, "cpu", self.decay, self.right, self.wrong)
        self.steps_trained = 0
        if self.start is not None:
            try:
                self.memory.read(self.start, self.fingerprint)
            except ValueError as error:
                raise ValueError(f"Argument `start` is of no use: {error}") from error
            self.losses = 1 - self.memory.rate

    @property
    def _knows_nothing(self) -> bool:
        return self.start is None

    def _choose(self, rule: Callable[..., Any], losses: Tensor, progress: float) -> tuple[Any, None]:
        return rule(self.memory.to("cpu"), self._generator(0), must=losses.isnan(), progress=progress), None

    def _begin_round(self) -> None:
        super()._begin_round()
        memory = self.memory.to("cpu")
        for name, value in (("solved", memory.solved > 0), ("failed", memory.failed > 0)):
            self.statistics[f"{name}_fraction"] = float(value.float().mean())
        self.statistics["explore_right"], self.statistics["explore_wrong"] = memory.explore.tolist()

    def trained(self, losses: Tensor) -> None:
        """Record that the next batch was trained on.

        Args:
            losses: Floating ``[G]``, the shares of wrong answers to its prompts, in the order of :attr:`next`, on any
                device; NaN for a prompt without answers. If a prompt occurs twice, the larger counts.
        """
        batch = self.next
        super().trained(losses)
        self.memory = self.memory.to(losses.device)
        shares = of_samples(batch, losses)
        ids = batch.ids.to(losses.device, non_blocking=True)
        self.memory.update(ids, shares, self.answers, self.steps_trained)
        self.memory.adapt(losses.float(), self.silent, 0.01)
        self.steps_trained += 1

    def state_dict(self) -> dict[str, Any]:
        """As that of the base, with the memory."""
        return {**super().state_dict(), "memory": self.memory.state_dict(), "steps_trained": self.steps_trained}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`.

        Raises:
            ValueError: If the state is of other prompts, another global batch or seed.
        """
        super().load_state_dict(state)
        self.memory.load_state_dict(state["memory"])
        self.steps_trained = state["steps_trained"]
