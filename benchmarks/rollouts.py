"""Rollouts: the time of a plan, and the time saved by running every prompt through the model once.

    python benchmarks/rollouts.py [PART ...]      # on an idle machine; one line of JSON a measurement

Medians; ratios are taken within one run.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

from curation.log_probs import token_log_probs
from curation.records import PromptMemory
from curation.rollouts.advantages import advantages
from curation.rollouts.allocation import HardnessWeighted, plan
from curation.rollouts.generation import generate, prefill
from curation.rollouts.max_variance import max_variance
from curation.samplers.prompt_rules import PROMPT_RULES


def seconds(work: Callable[[], Any], repeats: int) -> float:
    """The median seconds of some runs, after one that does not count."""
    work()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def planning() -> None:
    """Time plans for 3,072 prompts, and the advantages of their 60,000 rollouts."""
    generator = np.random.default_rng(0)
    successes = generator.binomial(8, generator.random(3072))
    extra = plan(HardnessWeighted(), successes, 8, 60_000)
    groups = torch.from_numpy(np.repeat(np.arange(3072), 8 + extra))
    rewards = torch.randint(0, 2, groups.shape).float()
    memory = PromptMemory(3072)
    for step in range(3):
        memory.update(
            torch.arange(3072), 1 - torch.from_numpy(generator.binomial(8, successes / 8) / 8).float(), 8, step
        )
    nothing = torch.zeros(3072, dtype=torch.bool)
    rules = {
        name: partial(rule, memory, torch.Generator(), must=nothing, progress=0.5)
        for name, rule in PROMPT_RULES.items()
    }
    times = {
        **{name: seconds(rule, 100) for name, rule in rules.items()},
        "max_variance": seconds(lambda: max_variance(rewards, groups, 3072, 8), 100),
        "plan": seconds(lambda: plan(HardnessWeighted(), successes, 8, 60_000), 100),
        "advantages": seconds(lambda: advantages(rewards, groups, 3072), 100),
    }
    print(
        json.dumps(
            {"prompts": 3072, "rollouts": len(groups), **{f"{k}_ms": round(1e3 * v, 2) for k, v in times.items()}}
        )
    )


def decoder(layers: int, vocabulary: int) -> Any:
    """A decoder as wide as SmolLM2-135M."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary, hidden_size=576, intermediate_size=1536, num_hidden_layers=layers,
            num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True, eos_token_id=None,
            bos_token_id=None, pad_token_id=None,
        )
    ).eval()  # fmt: skip


def answering() -> None:
    """Time 8 greedy answers of 32 tokens to each of 4 prompts of 128, in two stages, against ``model.generate``."""
    prompts = torch.randint(3, 1000, (4, 128), generator=torch.Generator().manual_seed(0))
    for layers, vocabulary in ((6, 8192), (6, 49152), (30, 49152)):
        model = decoder(layers, vocabulary)

        def shared_prefill(model: Any = model) -> Any:
            cache = prefill(model, list(prompts), 0, 16384)
            options: dict[str, Any] = {
                "max_new_tokens": 32,
                "stop_ids": [],
                "token_budget": 16384,
                "temperature": 0.0,
            }
            return [generate(model, cache, [4] * 4, generator=torch.Generator(), **options) for _ in range(2)]

        def own_generate(model: Any = model) -> Any:
            return [
                model.generate(
                    prompts.repeat_interleave(4, 0), max_new_tokens=32, min_new_tokens=32, do_sample=False,
                    attention_mask=torch.ones(16, 128, dtype=torch.int64), pad_token_id=0,
                )
                for _ in range(2)
            ]  # fmt: skip

        same = all(torch.equal(a.tokens, b[:, 128:]) for a, b in zip(shared_prefill(), own_generate(), strict=True))
        pairs = [(seconds(shared_prefill, 1), seconds(own_generate, 1)) for _ in range(3)]
        ratio = statistics.median(generated / shared for shared, generated in pairs)
        print(
            json.dumps({"layers": layers, "vocabulary": vocabulary, "times_as_fast": round(ratio, 2), "same": same})
        )


def log_probs() -> None:
    """Time the log-probabilities of 4,096 tokens with their gradient, in chunks and from whole logits."""
    hidden = torch.randn(4096, 576, requires_grad=True)
    weight, targets = torch.randn(49152, 576, requires_grad=True), torch.randint(0, 49152, (4096,))
    chunks = seconds(lambda: token_log_probs(hidden, weight, targets).sum().backward(), 3)
    whole = seconds(lambda: (-cross_entropy(hidden @ weight.T, targets, reduction="none")).sum().backward(), 3)
    logits = 4096 * 49152 * 4 / 2**30
    print(
        json.dumps(
            {"log_probs": 4096, "over_whole": round(chunks / whole, 2), "logits_GiB_not_held": round(logits, 2)}
        )
    )


if __name__ == "__main__":
    parts = {"planning": planning, "answering": answering, "log_probs": log_probs}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"one of {', '.join(parts)}; all of them by default")
    for part in parser.parse_args().parts or parts:
        parts[part]()
