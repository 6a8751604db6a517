"""One seam, whatever the batch and whoever overrides the hooks."""

import pytest
import torch
from helpers import COLLATES, AnyBatch, Classifier, Watch, assert_same_weights, data, loader, trainer, weights
from lightning.pytorch import Callback, LightningDataModule, seed_everything
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder, StochasticWeightAveraging
from lightning.pytorch.profilers import SimpleProfiler
from torch.utils.data import DataLoader

from curation.batch import batch_size
from curation.callbacks import ConceptCoverageMonitor, UniformSelection, UtilityDiversitySelection
from curation.callbacks.lightning.seam import BatchSeam
from curation.samplers.concept_index import ConceptIndex


def installed(run) -> bool:
    return "batch_to_device" in vars(run.strategy)


@pytest.mark.parametrize("kind", COLLATES)
@pytest.mark.parametrize("rule", [UniformSelection, UtilityDiversitySelection])
def test_every_kind_of_batch_is_cut_before_all_later_hooks(kind, rule):
    module, watch = AnyBatch(), Watch()
    run = trainer(rule(keep=0.25), watch, max_epochs=1)
    run.fit(module, DataLoader(data(32), batch_size=8, collate_fn=COLLATES[kind]))
    assert module.seen == [2] * 4
    assert [batch_size(b) for b in watch.batches] == [2] * 4
    assert all(type(b) is type(COLLATES[kind]([data(1)[0]])) for b in watch.batches)
    assert not installed(run)


def test_hooks_of_a_data_module_run_first_and_selection_still_happens():
    class Data(LightningDataModule):
        def train_dataloader(self):
            return loader()

        def on_after_batch_transfer(self, batch, dataloader_idx):
            x, y = batch  # the ids are gone already
            assert len(x) == 8
            return [x * 2, y]

    module = Classifier()
    run = trainer(UniformSelection(keep=0.5), max_epochs=1)
    with pytest.warns(UserWarning, match=r"Data\.on_after_batch_transfer runs before selection"):
        run.fit(module, datamodule=Data())
    assert module.seen == [4] * 8


def test_selection_stands_between_the_transfer_and_every_other_hook():
    """The order that the seam is built on; the published one has the transfer elsewhere."""
    order = []

    class Module(Classifier):
        def on_before_batch_transfer(self, batch, dataloader_idx):
            order.append("before transfer")
            return batch

        def transfer_batch_to_device(self, batch, device, dataloader_idx):
            order.append("transfer")
            return super().transfer_batch_to_device(batch, device, dataloader_idx)

        def on_after_batch_transfer(self, batch, dataloader_idx):
            order.append("after transfer")
            return batch

        def on_train_batch_start(self, batch, batch_idx):
            order.append("module start")

        def training_step(self, batch, batch_idx):
            order.append("step")
            return super().training_step(batch, batch_idx)

    class Rule(UniformSelection):
        def score(self, *args):
            order.append("select")
            return super().score(*args)

        def on_train_batch_start(self, *args):
            order.append("callback start")
            super().on_train_batch_start(*args)

    with pytest.warns(UserWarning, match="runs before selection"):
        trainer(Rule(keep=0.5), max_epochs=1, limit_train_batches=1).fit(Module(), loader())
    start = ["callback start", "module start"]
    assert order == ["before transfer", "transfer", "after transfer", "select", *start, "step"]


def test_validation_and_its_sanity_check_see_every_row_without_ids():
    module = Classifier()
    run = trainer(UniformSelection(keep=0.25), num_sanity_val_steps=2)
    run.fit(module, loader(), loader(batch_size=16, shuffle=False))
    assert module.seen_in_validation == 16
    for stage in (run.validate, run.test):
        module.seen_in_validation = None
        stage(module, loader(batch_size=16, shuffle=False), verbose=False)
        assert module.seen_in_validation == 16
        assert not installed(run)
    assert [len(batch) for batch in run.predict(module, loader(batch_size=16, shuffle=False))] == [16] * 4


def test_a_second_fit_without_the_callback_trains_on_everything():
    module = Classifier()
    run = trainer(UniformSelection(keep=0.25), max_epochs=1)
    run.fit(module, loader(ids=False))
    run.callbacks = [c for c in run.callbacks if not isinstance(c, UniformSelection)]
    run.fit_loop.max_epochs, module.seen = 2, []
    run.fit(module, loader(ids=False))
    assert module.seen == [8] * 8


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_nothing_is_left_after_an_exception_inside_fit(error):
    class Fails(Callback):
        def on_train_batch_end(self, *_):
            raise error("stop")

    run = trainer(UniformSelection(keep=0.25), Fails())
    with pytest.raises((error, SystemExit)):
        run.fit(Classifier(), loader())
    assert not installed(run)


def test_what_stood_in_for_the_transfer_before_comes_back():
    run = trainer(UniformSelection(keep=0.25), max_epochs=1)
    original = run.strategy.batch_to_device
    run.strategy.batch_to_device = replacement = lambda *a, **k: original(*a, **k)
    module = Classifier()
    run.fit(module, loader())
    assert module.seen == [2] * 8
    assert run.strategy.batch_to_device is replacement


def test_two_selections_are_refused_by_name():
    run = trainer(UniformSelection(keep=0.5), UtilityDiversitySelection(keep=0.5))
    with pytest.raises(ValueError, match=r"Only one .* but got UniformSelection and UtilityDiversitySelection"):
        run.fit(Classifier(), loader())
    assert not installed(run)


def test_a_step_that_fetches_its_own_batches_is_refused_before_training():
    class Fetches(Classifier):
        def training_step(self, dataloader_iter):
            raise AssertionError("must not run")

    concepts = ConceptIndex.from_lists([["a"]] * 64)
    for callback in (UniformSelection(keep=0.5), ConceptCoverageMonitor(concepts)):
        with pytest.raises(TypeError, match=r"Fetches\.training_step\(dataloader_iter\)"):
            trainer(callback).fit(Fetches(), loader())


def test_the_canary_stops_a_batch_that_went_around_the_seam():
    class GoesAround(Callback):
        def setup(self, trainer, pl_module, stage):
            del trainer.strategy.batch_to_device
            transfer = trainer.strategy.batch_to_device
            trainer.strategy.batch_to_device = lambda batch, **kw: transfer(batch[:2], **kw)

    with pytest.raises(RuntimeError, match=r"did not pass through `strategy\.batch_to_device`"):
        trainer(UniformSelection(keep=0.5), GoesAround()).fit(Classifier(), loader())


def test_ids_that_do_not_match_the_rows_are_an_error():
    class Doubles(Classifier):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            return [torch.cat([t, t]) for t in batch]

    with (
        pytest.warns(UserWarning, match="runs before selection"),
        pytest.raises(ValueError, match="8 sample ids but has 16 rows"),
    ):
        trainer(UniformSelection(keep=0.5)).fit(Doubles(), loader())


def test_averaged_batch_norm_statistics_see_every_row():
    module = Classifier()
    sizes = []
    module.net.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    run = trainer(UniformSelection(keep=0.25), StochasticWeightAveraging(0.01, swa_epoch_start=1), max_epochs=3)
    run.fit(module, loader())
    assert sizes[-8:] == [8] * 8
    assert set(sizes[:-8]) == {2}


class Tunable(Classifier):
    batch_size = 4
    lr = 0.1

    def train_dataloader(self):
        return loader(batch_size=self.batch_size)

    val_dataloader = train_dataloader

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)


@pytest.mark.parametrize(
    "tuner",
    [
        lambda: BatchSizeFinder(max_trials=2, init_val=4, steps_per_trial=1),
        lambda: LearningRateFinder(num_training_steps=6),
    ],
    ids=["batch size", "learning rate"],
)
def test_tuners_probe_selected_batches_and_leave_no_trace(tuner, tmp_path):
    module = Tunable()
    rule = UtilityDiversitySelection(keep=0.5)
    run = trainer(rule, tuner(), max_epochs=1, default_root_dir=tmp_path)
    run.fit(module)
    batches = 64 // module.batch_size
    assert rule.batches == batches
    assert rule.samples_trained == 32
    assert rule.scorer.memory.pushed == 32
    assert module.seen[0] == module.batch_size // 2 or module.seen[0] == 2  # probed on selected rows
    assert module.seen[-batches:] == [module.batch_size // 2] * batches


def test_keeping_everything_is_bit_identical_to_no_callback():
    runs = []
    for callbacks in ([], [UniformSelection(keep=1.0)], [UtilityDiversitySelection(keep=1.0)]):
        seed_everything(3, verbose=False)
        module = Classifier()
        trainer(*callbacks).fit(module, loader(ids=False))
        runs.append(weights(module))
    assert_same_weights(runs[0], runs[1])
    assert_same_weights(runs[0], runs[2])


def test_scoring_is_billed_to_the_callback():
    profiler = SimpleProfiler()
    trainer(UtilityDiversitySelection(keep=0.5), profiler=profiler, max_epochs=1).fit(Classifier(), loader())
    assert len(profiler.recorded_durations["[Callback]UtilityDiversitySelection.score"]) == 8


def test_the_seam_is_shared_and_leaves_with_its_last_client():
    run = trainer()
    run.strategy.connect(Classifier())
    first, second = UniformSelection(keep=0.5), UniformSelection(keep=0.5)
    BatchSeam.attach(run, first)
    seam = BatchSeam.of(run)
    BatchSeam.attach(run, second)
    assert BatchSeam.of(run) is seam
    BatchSeam.detach(run, first)
    assert installed(run)
    BatchSeam.detach(run, second)
    assert not installed(run)
