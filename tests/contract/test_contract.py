"""What every public callback promises; a new one is covered by an entry in the registry."""

import io
import pickle
from contextlib import nullcontext

import lightning.pytorch.callbacks
import pytest
import torch
import yaml
from helpers import Classifier, Watch, assert_same_weights, loader, trainer, weights
from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from processes import TwoRanks, forked, free_port, join

import curation.callbacks
from contract import strategies, worker
from contract.kinds import KINDS
from contract.registry import CALLBACKS, NOT_CALLBACKS, write_tags
from curation.callbacks import UniformSelection

every = pytest.mark.parametrize("entry", CALLBACKS.values(), ids=CALLBACKS)
selecting = [e for e in CALLBACKS.values() if e.selects and e.joined == 1]
each_selection = pytest.mark.parametrize("entry", selecting, ids=[e.name for e in selecting])


@pytest.fixture(autouse=True)
def folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_tags(64)


def test_every_public_callback_is_registered():
    assert set(curation.callbacks.__all__) == {e.cls.__name__ for e in CALLBACKS.values()} | NOT_CALLBACKS


@every
def test_pickles(entry):
    copy = pickle.loads(pickle.dumps(entry.make()))
    assert type(copy) is entry.cls
    assert repr(copy.state_dict()) == repr(entry.make().state_dict())


@pytest.mark.parametrize("entry", [e for e in CALLBACKS.values() if e.bad], ids=lambda e: e.name)
def test_a_bad_argument_is_named_with_its_value(entry):
    ((name, value),) = entry.bad.items()
    with pytest.raises(ValueError, match=f"Argument `{name}` must be .* but got {value}"):
        entry.make(**entry.bad)


@every
def test_command_line_round_trip(entry, capsys, tmp_path):
    from lightning.pytorch.cli import LightningCLI

    modules = {name: f"{made.__module__}.{made.__name__}" for name, made in entry.modules.items()}
    arguments = [f"--trainer.callbacks.{k}={v}" for k, v in (modules | entry.arguments).items()]
    add = [f"--trainer.callbacks+=curation.callbacks.{entry.cls.__name__}", *arguments]
    with pytest.raises(SystemExit):
        LightningCLI(Classifier, args=["fit", *add, "--print_config"], save_config_callback=None)
    printed = capsys.readouterr().out
    (callback,) = yaml.safe_load(printed)["trainer"]["callbacks"]
    assert callback["class_path"].endswith(entry.cls.__name__)
    (tmp_path / "config.yaml").write_text(printed)
    with pytest.raises(SystemExit):
        LightningCLI(
            Classifier,
            args=["fit", f"--config={tmp_path / 'config.yaml'}", "--print_config"],
            save_config_callback=None,
        )
    assert yaml.safe_load(capsys.readouterr().out)["trainer"]["callbacks"] == [callback]


@every
def test_state_loads_with_weights_only(entry):
    callback, *others = entry.in_trainer()
    trainer(callback, *others, max_epochs=1).fit(entry.module(), entry.loader())
    file = io.BytesIO()
    torch.save(callback.state_dict(), file)
    file.seek(0)
    assert torch.load(file, weights_only=True).keys() == callback.state_dict().keys()


@each_selection
def test_keeping_everything_is_bit_identical_to_no_callback(entry):
    def run(*callbacks):
        seed_everything(5, verbose=False)
        module = Classifier()
        trainer(*callbacks).fit(module, loader(ids=bool(callbacks)), loader(ids=False, shuffle=False))
        return weights(module), torch.get_rng_state()

    (expected, stream), (got, after) = run(), run(entry.make(keep=1.0))
    assert_same_weights(expected, got)
    assert torch.equal(stream, after)


@each_selection
def test_selecting_leaves_the_random_streams_of_training_alone(entry):
    streams = []

    class Stream(Callback):
        def on_train_batch_start(self, *_):
            streams.append(torch.get_rng_state())

    for callbacks in ([], [entry.make()]):
        seed_everything(5, verbose=False)
        batches = loader(ids=bool(callbacks))
        trainer(*callbacks, Stream(), max_epochs=1, limit_train_batches=1).fit(Classifier(), batches)
    assert torch.equal(*streams)


def traces(part):
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return vars(part).keys(), [len(vars(part)[name]) for name in hooks], part.training


@every
@pytest.mark.parametrize("fails", ["", "on_train_batch_end", "on_before_backward", "on_before_optimizer_step"])
def test_nothing_is_left_behind(entry, fails):
    class Fails(Callback):
        pass

    def stop(*_):
        raise RuntimeError("stop")

    if fails:
        setattr(Fails, fails, stop)

    module, batches = entry.module(), entry.loader()
    before = {**vars(module)}
    parts = [traces(part) for part in module.net.modules()]
    run = trainer(*entry.in_trainer(), Watch(), Fails())
    strategy = set(vars(run.strategy))
    samplers = batches.sampler, batches.batch_sampler
    try:
        run.fit(module, batches)
    except RuntimeError:
        assert fails
    assert set(vars(run.strategy)) == strategy
    assert (batches.sampler, batches.batch_sampler) == samplers
    assert parts == [traces(part) for part in module.net.modules()]
    assert {k for k in vars(module) if k not in before} <= {"_metric_attributes", "_hparams"}


@every
@pytest.mark.parametrize("kind", KINDS)
def test_works_in_every_kind_of_run_or_says_why_not(entry, kind):
    if kind == "ema" and not hasattr(lightning.pytorch.callbacks, "EMAWeightAveraging"):
        pytest.skip("Lightning has had it since 2.6")
    how, refusal = KINDS[kind], entry.refusal(kind)
    if how.needs:
        pytest.importorskip(how.needs)
    module, callbacks = how.module(entry), entry.in_trainer()
    run = trainer(*callbacks, *how.callbacks(), **how.trainer_options())
    if refusal is not None:
        with pytest.raises((TypeError, ValueError), match=refusal):
            run.fit(module, how.loader(entry))
        return
    warning = entry.warns.get(kind)
    with pytest.warns(UserWarning, match=warning) if warning else nullcontext():
        run.fit(module, how.loader(entry))
    assert how.seen(module) == {2 if entry.curates else 8}
    assert bool(entry.acted(callbacks[0])) == (warning is None)


@pytest.mark.parametrize(
    ("entry", "strategy"),
    [(e, s) for s in ("fsdp1", "deepspeed") for e in CALLBACKS.values() if e.refusal(s)],
    ids=lambda value: getattr(value, "name", value),
)
def test_strategies_that_were_never_tried_are_refused(entry, strategy):
    cls = {"fsdp1": FSDPStrategy, "deepspeed": DeepSpeedStrategy}[strategy]
    run = trainer(*entry.in_trainer())
    run._accelerator_connector.strategy = object.__new__(cls)  # neither starts without a GPU
    *_, refuses = entry.in_trainer()  # records stand beside a selection
    with pytest.raises(TypeError, match=entry.refusal(strategy)):
        refuses.setup(run, entry.module(), "fit")


@every
def test_works_with_weights_and_biases_offline(entry, tmp_path):
    logger = WandbLogger(project="contract", save_dir=tmp_path, offline=True)
    trainer(*entry.in_trainer(), logger=logger, max_epochs=1).fit(entry.module(), entry.loader())
    logger.experiment.finish()
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))


@each_selection
def test_validation_is_never_curated(entry):
    module = Classifier()
    trainer(entry.make()).fit(module, loader(), loader(shuffle=False))
    assert module.seen_in_validation == 8


def asked_for(request, fixture, names):
    """Those of the names whose tests were selected to run."""
    nodes = " ".join(item.name for item in request.session.items if fixture in item.fixturenames)
    return [name for name in names if name in nodes]


@pytest.fixture(scope="module")
def killed_and_whole(request, tmp_path_factory):
    """Every entry, with and without workers: killed at step 12 of 24 and resumed from step 10, and never killed."""
    results = {}
    for name in asked_for(request, "killed_and_whole", CALLBACKS):
        for workers in (0, 2):
            folder = tmp_path_factory.mktemp(f"{name}-{workers}")
            # Daemons may have no children, and a loader with workers has some.
            start = lambda *args: forked().Process(target=worker.run_until, args=args, daemon=False)  # noqa: E731
            whole = start(name, folder / "whole", workers, None, None, folder / "whole.pt")
            killed = start(name, folder / "killed", workers, 12, None, None)
            whole.start(), killed.start()
            join(whole), join(killed, code=-9)
            resumed = start(
                name, folder / "killed", workers, None, str(folder / "killed/step=10.ckpt"), folder / "resumed.pt"
            )
            resumed.start(), join(resumed)
            results[name, workers] = [torch.load(folder / f"{run}.pt") for run in ("whole", "resumed")]
    return results


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("name", CALLBACKS)
def test_a_run_killed_mid_epoch_resumes_bit_for_bit(killed_and_whole, name, workers):
    whole, resumed = killed_and_whole[name, workers]
    assert resumed["rows"] == whole["rows"][10:]
    assert_same_weights(whole["weights"], resumed["weights"])
    for callback, state in whole["callbacks"].items():
        if callback != "ExactResume":
            assert repr(state) == repr(resumed["callbacks"][callback])
    assert resumed["ledger"] == whole["ledger"]


@pytest.fixture(scope="module")
def two_ranks(request, tmp_path_factory):
    names = asked_for(request, "two_ranks", CALLBACKS)
    folder = tmp_path_factory.mktemp("ranks")
    port = free_port()
    ranks = [forked().Process(target=worker.two_ranks, args=(r, port, folder, names)) for r in (0, 1)]
    for rank in ranks:
        rank.start()
    join(*ranks)
    return folder


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
@pytest.mark.parametrize("name", [e.name for e in worker.OF_BATCHES])
def test_two_ranks_select_what_one_process_selects(two_ranks, name, strategy):
    expected = worker.one_process(name)
    for rank in (0, 1):
        got = torch.load(two_ranks / f"{name}-{strategy}-{rank}.pt")
        assert got["rows"] == expected["rows"][rank]
        for key, value in expected["weights"].items():
            torch.testing.assert_close(got["weights"][key], value, rtol=1e-5, atol=1e-6)


# Scores depend on BatchNorm's statistics, which DDP takes from rank 0 and FSDP2 does not.
WITHOUT_SCORES = [e for e in CALLBACKS.values() if e.joined == 1 or e.cls is UniformSelection]


@pytest.mark.parametrize("name", [e.name for e in WITHOUT_SCORES if e not in worker.OF_BATCHES])
def test_sharded_weights_are_trained_as_whole_ones(two_ranks, name):
    for rank in (0, 1):
        whole, sharded, without = (
            torch.load(two_ranks / f"{name}-{how}-{rank}.pt")["weights"] for how in ("ddp", "fsdp2", "without")
        )
        for key, _ in CALLBACKS[name].module().named_parameters():
            torch.testing.assert_close(sharded[key], whole[key], rtol=1e-5, atol=1e-6)
            assert not torch.equal(whole[key], without[key]), key


@each_selection
def test_ranks_agree_on_the_state_and_on_what_is_logged(two_ranks, entry):
    name = entry.cls.__name__
    one, other = (torch.load(two_ranks / f"{entry.name}-ddp-{r}.pt") for r in (0, 1))
    for key in one["callbacks"][name]:
        assert repr(one["callbacks"][name][key]) == repr(other["callbacks"][name][key])
    for key in {"curation/candidate_loss", "curation/samples_scored", "curation/samples_trained"} & set(
        one["logged"]
    ):
        assert one["logged"][key] == other["logged"][key]
    assert one["logged"]["curation/samples_trained"] == sum(len(b) for run in (one, other) for b in run["rows"])


@every
def test_a_run_goes_on_from_a_checkpoint_at_every_boundary(entry, tmp_path):
    folder = tmp_path / "interrupted"
    folder.mkdir()
    whole = worker.interrupted(entry.name, tmp_path)
    worker.interrupted(entry.name, folder, fails=True)
    for boundary, trained in {"first": 1, "last": 3, "validation": 3, "exception": 4}.items():
        resumed = worker.interrupted(entry.name, folder, resume=folder / f"{boundary}.ckpt")
        assert (boundary, resumed["rows"]) == (boundary, whole["rows"][trained:])
        assert_same_weights(whole["weights"], resumed["weights"])
        assert (boundary, repr(resumed["callbacks"])) == (boundary, repr(whole["callbacks"]))


@pytest.fixture(scope="module")
def ranks():
    ranks = TwoRanks()
    yield ranks
    ranks.stop()


@pytest.mark.parametrize(
    "entry",
    [e for e in CALLBACKS.values() if not e.refusal("unequal_ranks") and e.joined == 1],
    ids=lambda e: e.name,
)
def test_ranks_may_have_batches_of_unequal_size(ranks, entry, tmp_path):
    one, other = ranks.ask(worker.unequal_rank, *[(entry.name, str(tmp_path))] * 2)
    k = 2 if entry.curates else 8
    assert (one["seen"], set(other["seen"])) == ([k] * 4, {min(k, size) for size in worker.SIZES})
    assert [one["acted"], other["acted"]] == [True, True]
    assert one["state"] == other["state"]
    assert one["weights"] == other["weights"]


def over_all_processes(ranks, processes, entry, folder, **how):
    """Candidates of each step in the order of the sequence, and the answers of every process."""
    given = (entry.name, str(folder), processes, how.get("stops", False), how.get("resumes", False))
    answers = ranks.ask(worker.elastic, given, given) if processes == 2 else [worker.elastic(given)]
    steps = zip(*[answer["rows"] for answer in answers], strict=True)
    return [[sample for row in zip(*step, strict=True) for sample in row] for step in steps], answers


@every
@pytest.mark.parametrize(("before", "now"), [(2, 1), (1, 2)])
def test_another_number_of_processes_goes_on_with_the_same_samples(ranks, entry, before, now, tmp_path):
    folders = [tmp_path / "whole", tmp_path / "cut"]
    for folder in folders:
        folder.mkdir()
    whole, _ = over_all_processes(ranks, before, entry, folders[0])
    first, _ = over_all_processes(ranks, before, entry, folders[1], stops=True)
    rest, answers = over_all_processes(ranks, now, entry, folders[1], resumes=True)
    assert first[:2] + rest == whole
    assert len({sample for step in whole for sample in step}) == 64
    for answer in answers:
        assert answer["seen"] == [16 // now // (4 if entry.curates else 1)] * 2
        assert answer["acted"]
        assert answer["ended"]


def test_the_published_matrix_is_that_of_this_suite():
    assert strategies.PAGE.read_text() == strategies.page()
