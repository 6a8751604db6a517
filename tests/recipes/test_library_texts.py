"""Texts of the standard library, and the sources that are made of what every machine has."""

import argparse
from io import BytesIO

import pytest
import torch

from curation.recipes.image_text.glyphs import load_glyphs
from curation.recipes.image_text.picture_files import decode
from curation.recipes.library_texts import paragraphs, questions
from curation.recipes.pretrained import BYTES, load_model, load_tokenizer
from curation.recipes.rollouts import Sums
from curation.recipes.text_classification.text_embeddings import WORDS, embeddings


def test_docstrings_answer_questions():
    pairs = dict(questions())
    assert len(pairs) > 1000
    assert pairs["What is ArgumentParser of argparse?"] == argparse.ArgumentParser.__doc__.split("\n\n")[0].strip()
    assert all(answer.strip() and "\n" not in answer for answer in pairs.values())


def test_paragraphs_are_of_as_many_modules_and_as_many_of_each_as_asked():
    found = paragraphs(3, 20)
    assert [len(texts) for texts in found.values()] == [20] * 3
    assert list(found) == sorted(found)
    assert all(len(set(texts)) == 20 for texts in found.values())
    more = paragraphs(40, 80)
    assert len(more) == 40
    assert {len(texts) for texts in more.values()} == {80}


def test_counts_of_words_are_near_for_texts_with_the_same_words():
    same, also, other = embeddings(["a cat sat on a mat", "on a mat sat a cat", "x = y + 1"], WORDS, 64)
    assert torch.linalg.vector_norm(same) == pytest.approx(1)
    assert same @ also > 0.7 > 0.3 > same @ other
    cut, whole = (
        embeddings(["one two three", "one two four"], WORDS, 2),
        embeddings(["one two three", "one two four"], WORDS, 3),
    )
    assert cut[0] @ cut[1] > whole[0] @ whole[1]


def test_bytes_are_tokens_and_come_back(monkeypatch):
    pytest.importorskip("transformers", reason="needs transformers, from the [recipes] extra")
    tokenizer = load_tokenizer(BYTES)
    text = "naïve 日本\n\tx"
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(tokens) == len(text.encode())
    assert tokenizer.decode(tokens) == text
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    prompt = tokenizer.apply_chat_template(chat[:1], tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template(chat, tokenize=False)
    assert whole == f"{prompt}b<|im_end|>\n"
    assert len(tokenizer(whole, add_special_tokens=False)["input_ids"]) == len("user\na\nassistant\nb\n") + 4
    weights = []
    for seed in ("1", "1", "2"):
        monkeypatch.setenv("PL_GLOBAL_SEED", seed)
        model = load_model(BYTES)
        weights.append(model.get_input_embeddings().weight)
    assert len(weights[0]) == len(tokenizer)
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_glyphs_are_drawn_tagged_and_held_out_in_another_font():
    pytest.importorskip("PIL", reason="needs pillow, from the [recipes] extra")
    parts = load_glyphs(0)
    texts = [set(parts[name]["text"]) for name in ("validation", "test")]
    assert not texts[0] & texts[1]
    assert abs(len(texts[0]) - len(texts[1])) <= 1
    row = next(row for row in parts["train"] if row["text"] == "latin small letter o with diaeresis")
    assert row["tags"] == ["latin", "small", "o", "diaeresis"]
    picture = decode(BytesIO(row["image"]), 64).float().mean(0)
    assert 200 < picture.mean() < 250  # mostly white
    assert picture[28:36, 28:36].mean() > picture.mean()  # the inside of the o
    assert len({bytes(row["image"]) for row in parts["train"].select(range(200))}) > 150


def test_sums_that_are_made_are_right():
    task = Sums(200, seed=5, source="made")
    for i in range(200):
        first, second = task.question(i).removesuffix(" =").split("only. ")[1].split(" + ")
        assert 0 <= int(first) < 100 > int(second) >= 0
        assert task.solution(i) == str(int(first) + int(second))
        assert task.score(i, task.solution(i)) == 1 > task.score(i, str(int(first) + int(second) + 1))
    assert task.question(3) == Sums(1, seed=8, source="made").question(0)
    with pytest.raises(ValueError, match="Argument `source` must be 'reasoning_gym' or 'made', but got 'other'"):
        Sums(source="other")
