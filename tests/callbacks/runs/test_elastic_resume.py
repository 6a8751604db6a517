"""Exact resume on another number of processes: the same sequence of samples, divided into other batches."""

from contextlib import suppress
from itertools import chain
from types import SimpleNamespace

import pytest
import torch
from helpers import Classifier, data, trainer, weights
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lightning.pytorch import Callback, seed_everything
from processes import TwoRanks
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, WeightedRandomSampler

from curation.callbacks import ExactResume
from curation.callbacks.runs.random_streams import RandomStreams
from curation.samplers import (
    ConceptAwareSampler,
    ConceptIndex,
    GlobalBatchSampler,
    LengthGroupedSampler,
    MovingTargets,
    SubsetSampler,
    TokenBudgetSampler,
)

N = 61  # samples, which no number of processes divides
PLACE = [0, 1]  # rank and number of processes that the samplers see
CONCEPTS = ConceptIndex.from_lists([["abcdefg"[i % 7], "xyz"[i % 3]] for i in range(N)])
MOVING = MovingTargets({0: {"x": 1, "y": 1}, 90: {"z": 1}})
ORDERS = {
    "shuffled": None,
    "sequential": None,
    "own generator": None,
    "subset": lambda batch: SubsetSampler(range(N), range(0, N, 2), seed=3),
    "lengths": lambda batch: LengthGroupedSampler([i * 37 % 101 + 1 for i in range(N)], batch, window=2, seed=3),
    "moving": lambda batch: ConceptAwareSampler(CONCEPTS, batch, 2 * batch, targets=MOVING, seed=3),
    "concepts": lambda batch: ConceptAwareSampler(CONCEPTS, batch, 2 * batch, visit_penalty=0.1, seed=3),
}


def prepared(order, batch_size, rank, processes, drop_last=False):
    """The data loader as Lightning prepares it."""
    make = ORDERS[order]
    if make is not None:
        sampler = make(batch_size)
    elif processes > 1:
        sampler = DistributedSampler(range(N), processes, rank, shuffle=order != "sequential", seed=7)
    else:
        generator = torch.Generator() if order == "own generator" else None
        return DataLoader(range(N), batch_size, order != "sequential", generator=generator, drop_last=drop_last)
    return DataLoader(range(N), batch_size, sampler=sampler, drop_last=drop_last)


class Rank:
    """One process of a run, without a trainer."""

    def __init__(self, rank, processes, make, state):
        PLACE[:] = rank, processes
        self.resume, self.loader = ExactResume(), make(rank, processes)
        self.resume.fitting, self.place = True, (rank, processes)
        self.resume._streams = RandomStreams([100 + processes * 10 + r for r in range(processes)], rank)
        self.resume._processes = processes
        fit = SimpleNamespace(limit_train_batches=1.0, fit_loop=SimpleNamespace(), current_epoch=0)
        self.resume._seam = SimpleNamespace(joined=lambda: 1, trainer=fit)
        if state is not None:
            self.resume.load_state_dict(state)
        self.resume.watch(self.loader)

    def epoch(self, most=None):
        """The batches that are left of the epoch, or ``most`` of them."""
        PLACE[:] = self.place
        position, batches = self.resume.position, []
        begun = position.batches_in_epoch
        for batch in self.loader.batch_sampler:
            if len(batches) == most:
                return batches
            batches.append(batch)
            position.count_batch()
        assert begun + len(batches) == len(self.loader.batch_sampler)  # what Lightning ends the epoch by
        position.end_epoch()
        return batches


@pytest.fixture
def places(monkeypatch):
    monkeypatch.setattr(GlobalBatchSampler, "_place", property(lambda _: tuple(PLACE)))


def run(processes, make, state, most=None):
    """The samples of an epoch's steps over all processes, and the state of every process."""
    ranks = [Rank(rank, processes, make, state) for rank in range(processes)]
    parts = [rank.epoch(most) for rank in ranks]
    assert len({tuple(map(len, part)) for part in parts}) == 1  # as many rows on every process
    states = [rank.resume.state_dict() for rank in ranks]
    assert all(state == states[0] for state in states)
    return [list(zip(*step, strict=True)) for step in zip(*parts, strict=True)], states[0]


def samples(steps, order):
    """In the order of the sequence: row by row, of which each process has one sample."""
    flipped = order == "lengths"  # every second row goes to the processes in reverse
    rows = [row[::-1] if flipped and number % 2 else row for step in steps for number, row in enumerate(step)]
    return [sample for row in rows for sample in row]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    cuts=st.lists(st.tuples(st.integers(1, 4), st.integers(0, 6)), min_size=2, max_size=4),
    sizes=st.lists(st.integers(1, 4), min_size=5, max_size=5),
    epochs=st.integers(0, 2),
    order=st.sampled_from(sorted(ORDERS)),
)
def test_any_numbers_of_processes_train_on_one_sequence(places, cuts, sizes, epochs, order):
    """Each part of an epoch has a number of processes of its own; the last goes on with a whole epoch."""

    def part(processes, state, most=None):
        make = lambda rank, n: prepared(order, sizes[n], rank, n)  # noqa: E731
        steps, state = run(processes, make, state, most)
        return samples(steps, order), state

    state = None
    for _ in range(epochs):
        _, state = part(cuts[0][0], state)
    whole, after = part(cuts[0][0], state)
    whole = list(dict.fromkeys(whole))  # without what fills the last batch up
    following = list(dict.fromkeys(part(cuts[0][0], after)[0]))
    trained = []
    for processes, most in cuts:
        most = min(most, (len(whole) - len(trained) - 1) // (processes * sizes[processes]))  # inside the epoch
        more, state = part(processes, state, most)
        trained += more
    last = cuts[-1][0]
    more, state = part(last, state)
    trained += more
    assert trained[: len(whole)] == whole
    assert len(trained) - len(whole) < last
    again, _ = part(last, state)
    assert again[: len(whole)] == following


@pytest.mark.parametrize("before", [1, 2, 3, 4])
@pytest.mark.parametrize("now", [1, 2, 3, 4])
def test_with_drop_last_no_more_than_a_batch_is_left_out(places, before, now):
    """But a rest that makes no whole batch is trained on."""
    make = lambda rank, n: prepared("shuffled", 4, rank, n, drop_last=True)  # noqa: E731
    (whole, _), (steps, state) = run(before, make, None), run(before, make, None, 2)
    rest, _ = run(now, make, state)
    trained = samples(steps + rest, "shuffled")
    assert all(one == other for one, other in zip(trained, samples(whole, "shuffled"), strict=False))
    assert len(set(trained)) > N - 4 * now or len(rest) == 1


class Stream(IterableDataset):
    def __iter__(self):
        return iter(range(N))


class Stateful(DataLoader):
    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


REFUSED = {
    "WeightedRandomSampler": lambda: DataLoader(range(N), 4, sampler=WeightedRandomSampler([1.0] * N, N)),
    "RandomSampler": lambda: DataLoader(range(N), 4, sampler=torch.utils.data.RandomSampler(range(N), True)),
    "TokenBudgetSampler": lambda: DataLoader(range(N), batch_sampler=TokenBudgetSampler([2] * N, 8)),
    "SequentialSampler": lambda: DataLoader(range(N), None),  # the data set makes the batches
    "Stream": lambda: DataLoader(Stream(), 4),
    "Stateful": lambda: Stateful(range(N), 4),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.filterwarnings("ignore:ExactResume")
def test_an_order_that_cannot_be_divided_is_refused_by_name(places, name):
    message = f"saved by 2 processes and cannot be resumed exactly by 1: the order of {name}"
    known = {"kind": "shuffled", "seed": 0, "batch": 8, "samples": N}
    for order, make in (({"kind": name}, lambda: prepared("shuffled", 4, 0, 1)), (known, REFUSED[name])):
        state = Rank(0, 1, lambda *_, make=make: make(), None).resume.state_dict()
        with pytest.raises(ValueError, match=message):
            Rank(0, 1, lambda *_, make=make: make(), {**state, "processes": 2, "order": order})


@pytest.mark.parametrize("change", ["data", "earlier", "order"])
def test_what_was_changed_with_the_number_of_processes_is_named(places, change):
    _, state = run(2, lambda rank, n: prepared("shuffled", 4, rank, n), None, 2)
    make = lambda *_: prepared("shuffled", 4, 0, 1)  # noqa: E731
    if change == "data":
        make, message = lambda *_: DataLoader(range(50), 4, True), "after 16 of 61 samples .* now has 50"
    elif change == "earlier":
        state, message = {k: v for k, v in state.items() if k not in ("order", "processes")}, "earlier version"
    else:
        make, message = lambda *_: prepared("sequential", 4, 0, 1), "order of sequential cannot be divided"
    with pytest.raises(ValueError, match=message):
        Rank(0, 1, make, state)


# ------------------------------------------------------------------ in a fit


class Plain(Classifier):
    """Without random numbers and statistics of batches: a step depends on the rows of all processes alone."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
        self.rows, self.validated, self.begin = [], [], None

    def on_fit_start(self):
        if self.begin is not None:
            self.load_state_dict(self.begin["state_dict"])
            self.optimizers().optimizer.load_state_dict(self.begin["optimizer_states"][0])

    def training_step(self, batch, batch_idx):
        self.rows.append([ROWS[float(x)] for x in batch[0][:, 0]])
        return super().training_step(batch, batch_idx)

    def on_validation_epoch_end(self):
        self.validated.append(self.global_step)


ROWS = {float(x[0]): i for i, (x, _) in enumerate(data(N))}


class Saves(Callback):
    """A checkpoint after so many steps, by any hook, which ends the fit."""

    def __init__(self, hook, at, path):
        self.hook, self.at, self.path = hook, at, path

    def save(self, trainer, *_):
        if trainer.global_step == self.at and not trainer.sanity_checking:
            trainer.save_checkpoint(self.path)
            raise InterruptedError

    def __getattribute__(self, name):
        return self.save if name == super().__getattribute__("hook") else super().__getattribute__(name)


def fit(given):
    """A fit on as many processes as the environment has."""
    seed_everything(given.get("seed", 7), verbose=False)
    module, callbacks, options = Plain(), [ExactResume()], {"num_sanity_val_steps": 0, **given["options"]}
    callbacks += [Saves(*given["save"])] if "save" in given else []
    batches = DataLoader(data(N), given["batch_size"], shuffle=True)
    if given["processes"] == 2:
        options |= {"strategy": "ddp", "devices": 2}
    if "batches" in given:  # of both processes, trained on from weights and momentum alone
        module.begin, callbacks = torch.load(given["begin"], weights_only=False), []
        own = given["batches"][torch.distributed.get_rank() if given["processes"] == 2 else 0]
        batches, options["max_epochs"] = DataLoader(data(N), batch_sampler=own), 1
        options["use_distributed_sampler"] = False
    run = trainer(*callbacks, **options)
    with suppress(InterruptedError):
        run.fit(module, batches, DataLoader(data(8), 8), ckpt_path=given.get("resume"))
    values = {name: value.tolist() for name, value in weights(module).items()}
    return {"rows": module.rows, "weights": values, "validated": module.validated, "epoch": run.current_epoch}


@pytest.fixture(scope="module")
def ranks():
    ranks = TwoRanks()
    yield ranks
    ranks.stop()


def on(ranks, processes, **given):
    given = {"processes": processes, "options": {"max_epochs": 3}, **given}
    return ranks.ask(fit, given, given) if processes == 2 else [fit(given)]


def joined(answers):
    """Samples of every step of all processes, in the order of the sequence."""
    return [
        [sample for row in zip(*step, strict=True) for sample in row]
        for step in zip(*[a["rows"] for a in answers], strict=True)
    ]


PLACES = {
    "inside": ("on_train_batch_end", 3),
    "last": ("on_train_batch_end", 8),
    "end": ("on_train_epoch_end", 8),
    "validation": ("on_validation_end", 8),
    "before": ("on_train_batch_start", 3),
    "cut": ("on_train_end", 3),
}  # fmt: skip - by max_steps: Lightning takes the epoch for a finished one


@pytest.mark.parametrize(("before", "now", "sizes"), [(2, 1, (4, 8)), (2, 1, (4, 4)), (1, 2, (8, 4)), (1, 2, (8, 8))])
@pytest.mark.parametrize("place", PLACES)
def test_a_fit_goes_on_with_another_number_of_processes(ranks, tmp_path, before, now, sizes, place):
    """The weights are those of a fit on the new number that begins with the checkpoint's weights and position."""
    (hook, at), file, rows = PLACES[place], str(tmp_path / "x.ckpt"), sizes[1] * now
    whole = joined(on(ranks, before, batch_size=sizes[0]))  # epochs of 8 steps of 8 samples
    epochs = [list(dict.fromkeys(chain(*whole[8 * epoch : 8 * epoch + 8]))) for epoch in range(3)]
    options = {"max_epochs": 3, "max_steps": at if place == "cut" else -1}
    first = on(ranks, before, batch_size=sizes[0], save=(hook, at, file), options=options)
    assert joined(first)[:at] == whole[:at]
    resumed = on(ranks, now, batch_size=sizes[1], resume=file)
    left = [epochs[0][8 * at :], *epochs[1:]]
    steps = [epoch[i : i + rows] for epoch in left for i in range(0, len(epoch), rows)]
    steps = [step + step[: -len(step) % now] for step in steps]
    assert joined(resumed) == steps
    explicit = [[step[rank::now] for step in steps] for rank in range(now)]
    expected = on(ranks, now, batch_size=sizes[1], batches=explicit, begin=file)
    assert [one["weights"] for one in resumed] == [one["weights"] for one in expected]
    assert [one["epoch"] for one in resumed] == [3] * now
    assert len(resumed[0]["validated"]) == 2 + (at < 8)  # Lightning leaves out the one before which it was saved


def test_the_order_of_two_processes_is_that_of_the_seed_of_the_checkpoint(ranks, tmp_path):
    file = str(tmp_path / "x.ckpt")
    whole = joined(on(ranks, 2, batch_size=4))
    on(ranks, 2, batch_size=4, save=("on_train_batch_end", 3, file))
    assert joined(on(ranks, 2, batch_size=4, resume=file, seed=8)) == whole[3:]


@pytest.mark.parametrize("limit", [5, 0.5])
def test_a_limit_of_batches_is_refused(tmp_path, limit):
    file, options = tmp_path / "x.ckpt", {"max_epochs": 2, "limit_train_batches": limit}
    on(None, 1, batch_size=4, options=options, save=("on_train_batch_end", 2, file))
    state = torch.load(file, weights_only=False)
    state["callbacks"]["ExactResume"]["processes"] = 2
    torch.save(state, file)
    with pytest.raises(ValueError, match="with `limit_train_batches`"):
        on(None, 1, batch_size=8, options=options, resume=file)


def test_a_window_of_accumulation_that_is_cut_is_said(tmp_path):
    file, options = tmp_path / "x.ckpt", {"max_epochs": 2, "accumulate_grad_batches": 2}
    on(None, 1, batch_size=4, options=options, save=("on_train_batch_end", 1, file))
    state = torch.load(file, weights_only=False)
    state["callbacks"]["ExactResume"].update(processes=2)
    torch.save(state, file)
    with pytest.warns(UserWarning, match="first optimizer step after the change .* has 1 batches, and not 2"):
        on(None, 1, batch_size=8, options=options, resume=file)
