"""Batches before their time: a data loader that knows which come next, and training steps tried on them."""

import copy
import itertools
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy

from curation.callbacks.lightning.seam import BatchSeam, SeamClient, check_training_step
from curation.callbacks.online.online_selection import OnlineSelection
from curation.replace import replace_attribute
from curation.scoring import side_effect_free


class LookAhead:
    """The batches of a loader, some of which are fetched before they are asked for; in all else it is the loader.

    Args:
        loader: Of the batches.
        ahead: How many to have fetched beyond the one that is given.

    Attributes:
        queue: Those that come next.

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
    """Tries the training steps of an accumulation window before it, without gradients, logs or a trace.

    Args:
        trainer: Of the fit, which is about to ask for its data loader.
        pl_module: Its module.

    Raises:
        TypeError, ValueError: If steps cannot be tried there.
    """

    def __init__(self, trainer: Trainer, pl_module: LightningModule) -> None:
        check_training_step(pl_module)
        if not pl_module.automatic_optimization:
            raise ValueError("Argument `estimator` must not be 'prepass' where the module optimizes by hand.")
        if not isinstance(trainer.strategy, (SingleDeviceStrategy, DDPStrategy)):
            raise ValueError(f"Argument `estimator` must not be 'prepass' with {type(trainer.strategy).__name__}.")
        others = [type(c).__name__ for c in trainer.callbacks if isinstance(c, OnlineSelection)]  # type: ignore[attr-defined]
        if others:
            raise ValueError(f"Argument `estimator` must not be 'prepass' beside {others[0]}, which changes batches.")
        self.trainer = trainer
        self.loader: LookAhead | None = None
        BatchSeam.attach(trainer, self)

    def watch(self, dataloader: Any) -> Any:
        """Have the batches of a window at its beginning."""
        loader = dataloader.loader if isinstance(dataloader, LookAhead) else dataloader
        if hasattr(loader, "state_dict"):
            raise ValueError(f"Argument `estimator` must not be 'prepass' with a stateful {type(loader).__name__}.")
        trainer, loop = self.trainer, self.trainer.fit_loop
        self.loader = LookAhead(loader, lambda: 0 if loop._skip_backward else trainer.accumulate_grad_batches - 1)
        return self.loader

    def steps(self, batch: Any, batch_idx: int, count: int) -> Iterator[Any]:
        """Batches of which the training step has just run: ``batch``, and the ``count - 1`` after it."""
        trainer, loader, seam = self.trainer, self.loader, BatchSeam.of(self.trainer)
        loop, module = trainer.fit_loop, trainer.lightning_module
        if trainer.train_dataloader is not loader:
            raise ValueError("Argument `estimator` must not be 'prepass' with several data loaders.")
        assert loader is not None
        assert seam is not None
        assert loop._data_fetcher is not None
        if loop._data_fetcher.length is None:
            raise ValueError("Argument `estimator` must not be 'prepass' with a data loader that has no length.")
        with ExitStack() as quiet:
            for name in ("log", "log_dict"):
                quiet.callback(replace_attribute(module, name, lambda *_, **__: None))
            for i, other in enumerate([None, *itertools.islice(loader.queue, count - 1)]):
                with side_effect_free(module), trainer.precision_plugin.train_step_context():
                    one = copy.copy(batch) if other is None else seam.transfer(other)
                    given = copy.copy(one)  # a training step may empty it
                    named = loop.epoch_loop._build_kwargs(OrderedDict(), given, batch_idx + i)
                    module.training_step(*named.values())
                    yield one
