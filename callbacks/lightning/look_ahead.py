"""Batches that come next: a data loader that fetches them early, and training steps that are tried on them."""

import copy
import itertools
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy

from curation.callbacks.lightning.loop import muted, skips_backward
from curation.callbacks.lightning.seam import BatchSeam, SeamClient, check_training_step
from curation.callbacks.online.online_selection import OnlineSelection
from curation.scoring import side_effect_free


class LookAhead:
    """A data loader of which some batches are fetched early; every other attribute is that of the loader.

    Args:
        loader: The data loader that yields the batches.
        ahead: Returns how many batches to fetch beyond the one that is yielded.

    Attributes:
        queue: The batches that come next and are fetched already.

    Example:
        >>> loader = LookAhead([1, 2, 3, 4], lambda: 2)
        >>> [(batch, list(loader.queue)) for batch in loader]
        [(1, [2, 3]), (2, [3, 4]), (3, [4]), (4, [])]
    """

    loader: Any
    ahead: Callable[[], int]
    queue: deque[Any]

    def __init__(self, loader: Any, ahead: Callable[[], int]) -> None:
        vars(self).update(loader=loader, ahead=ahead, queue=deque())

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        self.queue.clear()
        for batch in self.loader:
            self.queue.append(batch)
            if len(self.queue) > self.ahead():
                yield self.queue.popleft()
        while self.queue:
            yield self.queue.popleft()

    def __getattr__(self, name: str) -> Any:
        if name == "loader":  # while it is being unpickled
            raise AttributeError(name)
        return getattr(self.loader, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.loader, name, value)  # such as what Lightning seeds workers with


class StepsAhead(SeamClient):
    """Tries the training steps of an accumulation window before it starts, without gradients, logs or side effects.

    Args:
        trainer: The trainer, before it asks for its data loader.
        pl_module: The module that is trained.

    Raises:
        TypeError: If the module fetches its own batches.
        ValueError: If steps cannot be tried with this module, strategy or set of callbacks.
    """

    def __init__(self, trainer: Trainer, pl_module: LightningModule) -> None:
        check_training_step(pl_module)
        if not pl_module.automatic_optimization:
            raise ValueError("Argument `estimator` must not be 'prepass' where the module optimizes by hand.")
        if not isinstance(trainer.strategy, (SingleDeviceStrategy, DDPStrategy)):
            raise ValueError(f"Argument `estimator` must not be 'prepass' with {type(trainer.strategy).__name__}.")
        rules = [type(c).__name__ for c in trainer.callbacks if isinstance(c, OnlineSelection)]  # type: ignore[attr-defined]
        if rules:
            raise ValueError(f"Argument `estimator` must not be 'prepass' beside {rules[0]}, which changes batches.")
        self.trainer = trainer
        self.loader: LookAhead | None = None
        BatchSeam.attach(trainer, self)

    def watch(self, dataloader: Any) -> Any:
        """Fetch all batches of an accumulation window at its beginning.

        Raises:
            ValueError: If the data loader is stateful: its state would be that of batches not trained on yet.
        """
        loader = dataloader.loader if isinstance(dataloader, LookAhead) else dataloader
        if hasattr(loader, "state_dict"):
            raise ValueError(f"Argument `estimator` must not be 'prepass' with a stateful {type(loader).__name__}.")
        trainer = self.trainer
        self.loader = LookAhead(loader, lambda: 0 if skips_backward(trainer) else trainer.accumulate_grad_batches - 1)
        return self.loader

    def steps(self, batch: Any, batch_idx: int, count: int) -> Iterator[Any]:
        """Run the training steps of ``batch`` and of the ``count - 1`` batches after it, and yield each batch.

        Args:
            batch: The batch that is trained on next, on the device.
            batch_idx: Index of the batch in its epoch.
            count: Number of steps to try.

        Raises:
            ValueError: If there are several data loaders, or the data loader has no length.
        """
        trainer, loader, seam = self.trainer, self.loader, BatchSeam.of(self.trainer)
        loop, module = trainer.fit_loop, trainer.lightning_module
        if trainer.train_dataloader is not loader:
            raise ValueError("Argument `estimator` must not be 'prepass' with several data loaders.")
        assert loader is not None
        assert seam is not None
        assert loop._data_fetcher is not None
        if loop._data_fetcher.length is None:
            raise ValueError("Argument `estimator` must not be 'prepass' with a data loader that has no length.")
        with muted(module):
            for i, coming in enumerate([None, *itertools.islice(loader.queue, count - 1)]):
                with side_effect_free(module), trainer.precision_plugin.train_step_context():
                    tried = copy.copy(batch) if coming is None else seam.transfer(coming)
                    given = copy.copy(tried)  # a training step may empty it
                    arguments = loop.epoch_loop._build_kwargs(OrderedDict(), given, batch_idx + i)
                    module.training_step(*arguments.values())
                    yield tried
