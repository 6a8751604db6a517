"""Lightning's counters in a checkpoint, where they do not tell at which batch the fit was (2.6.6)."""

from typing import Any

from lightning.pytorch import Trainer


def processed_batches(trainer: Trainer) -> int:
    """Batches of all epochs that Lightning has trained on."""
    total: Any = trainer.fit_loop.epoch_loop.batch_progress.total
    return total.processed


def processed_in_epoch(trainer: Trainer) -> int:
    """Batches that Lightning has trained on in the epoch that it is in or has ended."""
    current: Any = trainer.fit_loop.epoch_loop.batch_progress.current
    return current.processed


def uncounted_batches(checkpoint: dict[str, Any], counted: int) -> int:
    """Batches of an unfinished epoch that Lightning counts as trained on, beyond ``counted`` of all epochs."""
    loop = checkpoint["loops"]["fit_loop"]
    epoch = loop["epoch_progress"]["current"]
    if epoch["started"] == epoch["processed"]:  # the last batch may be one that `on_train_batch_start` left out
        return 0
    return loop["epoch_loop.batch_progress"]["total"]["processed"] - counted


def saved_at_last_batch(checkpoint: dict[str, Any]) -> bool:
    """Whether the batch that Lightning trained on last was the last of its epoch."""
    batches = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    return batches["is_last_batch"] and batches["current"]["ready"] == batches["current"]["processed"]


def mend_counters(trainer: Trainer, checkpoint: dict[str, Any]) -> None:
    """Let a fit go on from a checkpoint at the batch after the last one that was trained on.

    Lightning takes an epoch that ``max_steps``, ``max_time`` or ``should_stop`` cut for a finished one, and goes on
    with the next epoch. With ``max_steps`` it trains on a batch too many after an epoch that was saved at its end,
    and its counters lose track of the place after a batch that is None. Each such state becomes that of a checkpoint
    that was saved right after the training step.

    Args:
        trainer: The trainer that resumes.
        checkpoint: The checkpoint, before Lightning restores its loops; changed in place.
    """
    loop = checkpoint["loops"]["fit_loop"]
    batches, epochs = loop["epoch_loop.batch_progress"], loop["epoch_progress"]
    current, total, last = batches["current"], batches["total"], batches["is_last_batch"]
    failed = current["ready"] > current["processed"]  # the step raised an error
    between = epochs["current"]["started"] == epochs["current"]["processed"] and current["ready"] > 0
    rewritten = between and (not last or trainer.max_steps != -1)
    if rewritten:
        for progress in epochs.values():
            progress.update(ready=progress["started"])
            progress.update(dict.fromkeys(("processed", "completed"), progress["started"] - 1))
        current.update(dict.fromkeys(("started", "processed"), current["ready"]), completed=current["ready"] - 1)
    for name in ("started", "processed", "completed"):
        total[name] = total["ready"] - (current["ready"] - current[name] if name != "started" else 0)
    if (rewritten or failed) and (last or current["ready"] % trainer.accumulate_grad_batches == 0):
        loop["epoch_loop.state_dict"]["_batches_that_stepped"] -= 1  # Lightning adds it again


def begin_next_epoch(trainer: Trainer) -> None:
    """Count the next epoch as one of its own, and call ``on_train_epoch_start``, where Lightning goes on with it.

    After a checkpoint of an epoch's last batch Lightning takes the next epoch for the one that was interrupted.
    """
    loop = trainer.fit_loop
    progress: Any = loop.epoch_progress.current
    if loop.restarted_mid_epoch and progress.processed == progress.started:
        loop.reset_restart_stage()


def resume_at(trainer: Trainer, batches: int) -> None:
    """Let Lightning count so many batches of the epoch as trained on, where batches had another size before.

    Call it in ``on_train_start``.
    """
    current: Any = trainer.fit_loop.epoch_loop.batch_progress.current
    more = batches - current.processed
    for name, count in list(vars(current).items()):  # that of a step that failed stays ahead
        setattr(current, name, count + more)
