"""Class paths of checkpoints and configurations that were written before each family of recipes had a folder."""

from importlib import import_module

import pytest

from curation.recipes import _MOVED

# Every class path that a packaged recipe or a page of the documentation has ever named.
OLD = [
    "answers.Rollouts", "arms.Arm", "domains.DomainSampler", "domains.Domains", "domains.Pieces",
    "expert_picture.ExpertPicture", "fits.Run", "images.CorruptedShare", "images.ImageClassifier", "images.Images",
    "language_models.FromScratch", "language_models.LanguageModelSource", "language_models.Pretrained",
    "language_models.Text", "mixture.MixtureLM", "policy.PolicyModule", "prompts.Prompts", "report.build",
    "sft.Conversations", "sft.SupervisedFineTuning", "solve_picture.SolvePicture", "tasks.Expression",
    "tasks.FinalNumber",
    "tasks.Puzzles", "tasks.ReasoningGym", "tasks.Task", "texts.LinearProbe", "texts.TextEmbeddings",
]  # fmt: skip


@pytest.mark.parametrize("path", OLD)
def test_an_old_class_path_names_the_class_in_its_new_place(path):
    module, _, name = path.partition(".")
    moved = getattr(import_module(f"curation.recipes.{module}"), name)
    assert moved.__name__ == name
    assert moved.__module__.startswith(f"curation.recipes.{_MOVED[module].partition('.')[0]}")


def test_every_moved_module_is_named_above():
    assert {path.partition(".")[0] for path in OLD} == set(_MOVED)
