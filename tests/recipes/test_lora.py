"""Adapters in the recipes for language models: what is trained, what is saved, and what selections see."""

import math

import pytest
import torch
from helpers import assert_same_weights, trainer, weights
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from curation.batch import SampleIds
from curation.callbacks import ExactResume, HardSampleSelection, UtilityDiversitySelection
from curation.recipes import lora
from curation.recipes.catalogue import find_recipe
from curation.recipes.chat import SupervisedFineTuning
from curation.recipes.compare.arms import resolve
from curation.recipes.rollouts import FromScratch, PolicyModule
from curation.scoring import per_sample_loss

transformers = pytest.importorskip("transformers", reason="needs transformers, from the [recipes] extra")
peft = pytest.importorskip("peft", reason="needs peft, from the [lora] extra")

VOCABULARY = 50
LORA = {"rank": 2, "targets": ["q_proj", "v_proj"], "alpha": 4}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        initializer_range=0.3,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


def module(folder, settings=LORA, moved=False, **options):
    """A module with adapters; ``moved`` away from where they change nothing."""
    made = SupervisedFineTuning(model=folder, gguf_file=None, lora=settings, **options)
    made.configure_model()
    if moved:
        generator = torch.Generator().manual_seed(1)
        for name, parameter in made.named_parameters():
            if ".lora_B." in name:
                torch.nn.init.normal_(parameter, std=0.5, generator=generator)
    return made


def rows(n=32, length=9):
    generator = torch.Generator().manual_seed(2)
    samples = []
    for i in range(n):
        ids = torch.randint(2, VOCABULARY, (length,), generator=generator)
        labels = ids.masked_fill(torch.arange(length) < 2 + i % 4, -100)
        samples.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
    return samples


def batch():
    return torch.utils.data.default_collate(rows(4))


def is_adapter(name):
    return ".lora_A." in name or ".lora_B." in name


def test_adapters_change_nothing_at_first_and_have_the_gradient_of_the_whole_model(tiny):
    plain, adapted = module(tiny, None), module(tiny)
    torch.testing.assert_close(adapted.loss(batch())[0], plain.loss(batch())[0])
    trained, whole = module(tiny, moved=True), module(tiny, moved=True)
    loss, expected = trained.loss(batch())[0], whole.model(**batch()).loss
    torch.testing.assert_close(loss, expected)
    assert abs(loss - plain.loss(batch())[0]) > 1e-2
    loss.backward()
    expected.backward()
    for (name, a), (_, b) in zip(trained.model.named_parameters(), whole.model.named_parameters(), strict=True):
        assert (a.grad is not None) == is_adapter(name)
        if is_adapter(name):
            torch.testing.assert_close(a.grad, b.grad)
            assert a.grad.any()


def test_the_scale_is_alpha_over_rank_and_the_draw_depends_on_the_seed_alone(tiny):
    made = []
    for seed, draws in ((5, 0), (5, 3), (6, 0)):
        seed_everything(seed, verbose=False)
        torch.rand(draws)
        made.append(module(tiny, {"rank": 2, "targets": ["q_proj"]}))
    layer = made[0].model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    assert layer.scaling == {"default": 2.0}
    assert (
        module(tiny).model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj").scaling["default"] == 2
    )
    first, same, other = (weights(m) for m in made)
    assert_same_weights(first, same)
    assert any(not torch.equal(first[name], other[name]) for name in first if ".lora_A." in name)


def fit(made, *callbacks, ckpt_path=None, **options):
    run = trainer(*callbacks, ExactResume(), **{"max_epochs": 1, **options})
    run.fit(made, DataLoader(SampleIds(rows()), 8), ckpt_path=ckpt_path)
    return run


def test_a_fit_trains_the_adapters_alone_and_goes_on_from_its_checkpoint(tiny, tmp_path):
    made = module(tiny, lr=1e-2)
    before = weights(made.model)
    save = ModelCheckpoint(tmp_path, every_n_train_steps=2, save_top_k=-1, filename="{step}")
    run = fit(made, save, enable_checkpointing=True)
    after = weights(made.model)
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    assert changed == {name for name in after if is_adapter(name)}
    (group,) = run.optimizers[0].param_groups
    adapters = [p for n, p in made.named_parameters() if is_adapter(n)]
    assert list(map(id, group["params"])) == list(map(id, adapters))
    assert all(not p.requires_grad for n, p in made.named_parameters() if not is_adapter(n))

    again = SupervisedFineTuning(model=tiny, gguf_file=None, lora=LORA, lr=1e-2)
    fit(again, ckpt_path=tmp_path / "step=2.ckpt")
    assert_same_weights(weights(again.model), after)
    state = torch.load(tmp_path / "step=4.ckpt", weights_only=True)
    assert state["hyper_parameters"]["lora"] == LORA
    loaded = SupervisedFineTuning(**state["hyper_parameters"])
    loaded.configure_model()
    loaded.load_state_dict(state["state_dict"])
    torch.testing.assert_close(loaded.loss(batch())[0], made.loss(batch())[0])


class Seen:
    """Scores and kept rows of a selection."""

    def setup(self, trainer, pl_module, stage):
        super().setup(trainer, pl_module, stage)
        self.scores, self.rows = [], []

    def score(self, *args):
        scores = super().score(*args)
        self.scores.append(scores.clone())
        return scores

    def on_kept(self, trainer, rows, k):
        self.rows.append(rows.tolist())
        super().on_kept(trainer, rows, k)


class Diverse(Seen, UtilityDiversitySelection):
    pass


class Hardest(Seen, HardSampleSelection):
    pass


@pytest.mark.parametrize("settings", [LORA, {"rank": 2, "targets": ["q_proj", "lm_head"]}])
def test_a_selection_finds_the_head_of_an_adapted_model_unless_it_is_adapted_itself(tiny, settings):
    by_head, by_logits = Diverse(keep=0.25), Diverse(keep=0.25, head="none")
    for selection in (by_head, by_logits):
        fit(module(tiny, settings, moved=True, lr=1e-12), selection)
    assert ("without forming logits" in by_head.describe()) == ("lm_head" not in settings["targets"])
    assert by_head.rows == by_logits.rows
    for a, b in zip(by_head.scores, by_logits.scores, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=2e-3, atol=2e-3)


def test_rows_with_the_highest_loss_are_those_of_the_adapted_model(tiny):
    selection, made = Hardest(keep=0.25, rule="top"), module(tiny, moved=True, lr=1e-12)
    fit(made, selection)
    plain, differs = module(tiny, None), False
    for step, candidates in enumerate(DataLoader(rows(), 8)):
        best = []
        for model in (made.model, plain.model):
            with torch.no_grad():
                logits = model(candidates["input_ids"]).logits[:, :-1]
            best.append(sorted(per_sample_loss(logits, candidates["labels"][:, 1:]).topk(2).indices.tolist()))
        assert selection.rows[step] == best[0]
        differs |= best[0] != best[1]
    assert differs  # else the scores might be those of the frozen weights


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (8, "`lora` must be None or have `rank`, `targets` and optionally `alpha`, but got 8"),
        ({"rank": 8}, "`lora` must be None or have .* but got {'rank': 8}"),
        ({**LORA, "dropout": 0.1}, "`lora` must be None or have .*'dropout'"),
        ({**LORA, "rank": 0}, "`lora.rank` must be an integer >= 1, but got 0"),
        ({**LORA, "rank": 1.5}, "`lora.rank` must be an integer >= 1, but got 1.5"),
        ({**LORA, "alpha": math.nan}, r"`lora.alpha` must be in \(0, inf\), but got nan"),
        ({**LORA, "targets": []}, r"`lora.targets` must be a list of names, at least one, but got \[\]"),
        ({**LORA, "targets": "q_proj"}, "`lora.targets` must be a list of names, at least one, but got 'q_proj'"),
    ],
)
def test_bad_settings_are_named(settings, message):
    source = FromScratch("abc=", hidden=16, layers=1, heads=2, context=16)
    for make in (lambda: SupervisedFineTuning(lora=settings), lambda: PolicyModule(source, lora=settings)):
        with pytest.raises(ValueError, match=f"^Argument {message}"):
            make()


def test_layers_that_are_not_there_and_a_missing_peft_are_named(tiny, monkeypatch):
    with pytest.raises(
        ValueError, match=r"`lora.targets` must name layers of LlamaForCausalLM, but it has no 'proj'"
    ):
        module(tiny, {**LORA, "targets": ["q_proj", "proj"]})
    monkeypatch.setattr(lora, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"need peft. Run `pip install 'lightning-curation\[lora\]'`"):
        module(tiny)
    assert not isinstance(module(tiny, None).model, peft.PeftModel)


@pytest.mark.parametrize("recipe", ["sft_utility_diversity", "rollouts"])
def test_settings_come_through_the_command_line(recipe):
    config = resolve([f"--config={find_recipe(recipe)}", "--model.lora={rank: 8, targets: [q_proj, v_proj]}"])
    assert config["model"]["init_args"]["lora"] == {"rank": 8, "targets": ["q_proj", "v_proj"]}
    with pytest.raises(ValueError, match="lora"):
        resolve([f"--config={find_recipe(recipe)}", "--model.lora={rank: many, targets: [q_proj]}"])
