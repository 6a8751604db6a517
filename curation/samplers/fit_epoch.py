"""The epoch of a Lightning fit that is asking for an iterator."""

import inspect
from typing import Any


def fit_epoch() -> int | None:
    """The epoch of the Lightning fit that this is called in, where it has not set the epoch of its samplers yet.

    Lightning begins to iterate before it calls ``set_epoch`` (2.6.6), and loader workers have their first indices by
    then: those of epoch 0 in a fit that is resumed.

    Returns:
        None outside of ``setup_data`` of a fit, which asks for the first iterator.
    """
    loop = fit_loop()
    if loop is None:
        return None
    epoch, batches = loop.epoch_progress.current, loop.epoch_loop.batch_progress
    trained = batches.is_last_batch and batches.current.ready == batches.current.processed
    return epoch.processed + int(loop.restarting and trained and epoch.started > epoch.processed)


def fit_loop() -> Any:
    """The loop of the Lightning fit whose ``setup_data`` this is called in; None elsewhere.

    A sampler has no other way to the fit than the call stack.
    """
    frame = inspect.currentframe()
    while frame is not None:
        loop: Any = frame.f_locals.get("self") if frame.f_code.co_name == "setup_data" else None
        if hasattr(loop, "epoch_progress"):
            return loop
        frame = frame.f_back
    return None
