"""What every method costs on a GPU, beside what it could cost at best.

    pip install 'lightning-curation[recipes,select]'
    python benchmarks/gpu.py --output gpu.json
    python benchmarks/gpu.py --report gpu.json > gpu.md

Online rules: a decoder of 234 million random weights (12 layers of 1024, as Llama), 64 candidates of 512 tokens, 16
trained on. The ideal step is a forward pass of all candidates and a step of training on as many as are kept. Instance
selection: seconds on the GPU and, but for graph attention, on the CPU of the same machine. Medians of runs in turn.
"""

import argparse
import gc
import json
import logging
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from instance_selection import CAPACITY, VIEWS, K, clusters
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from curation.batch import SampleIds
from curation.callbacks import (
    ConceptAwareSelection,
    HardSampleSelection,
    OnlineSelection,
    UniformSelection,
    UtilityDiversitySelection,
)
from curation.instances import hashing
from curation.instances.selectors import CoverageInstanceSelector, GraphAttentionInstanceSelector
from curation.online.nuclear_norm import gram_of_head, nuclear_norm_from_hidden
from curation.samplers.concept_index import ConceptIndex

CANDIDATES, KEEP, TOKENS, SAMPLES, WORDS = 64, 0.25, 512, 2048, 32_000
FIRST, LAST = 8, 24  # steps between which the clock runs


class LanguageModel(LightningModule):
    """A decoder that is not trained."""

    def __init__(self) -> None:
        super().__init__()
        self.model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=WORDS, hidden_size=1024, intermediate_size=4096, num_hidden_layers=12,
                num_attention_heads=16, num_key_value_heads=16, tie_word_embeddings=True,
            )
        )  # fmt: skip

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Next-token cross-entropy."""
        return self.model(**batch).loss

    def configure_optimizers(self) -> Any:
        """AdamW."""
        return torch.optim.AdamW(self.parameters(), lr=1e-5, fused=True)


class Clock(Callback):
    """Seconds of a step and peak memory in GiB, from one step to a later one."""

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Read the clock, twice."""
        if trainer.global_step == FIRST:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.began = time.perf_counter()
        elif trainer.global_step == LAST:
            torch.cuda.synchronize()
            self.seconds = (time.perf_counter() - self.began) / (LAST - FIRST)
            self.memory = torch.cuda.max_memory_allocated() / 2**30


def texts() -> list[dict[str, Tensor]]:
    """Random tokens, all of one length."""
    ids = torch.randint(0, WORDS, (SAMPLES, TOKENS), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row} for row in ids]


def fit(precision: Any, rows: int, *callbacks: Callback) -> tuple[float, float]:
    """Seconds of a step and peak memory in GiB."""
    clock = Clock()
    trainer = Trainer(
        accelerator="gpu", devices=1, precision=precision, max_steps=LAST, max_epochs=-1, logger=False,
        callbacks=[*callbacks, clock], enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    data: Any = SampleIds(texts()) if callbacks else texts()
    trainer.fit(LanguageModel(), DataLoader(data, rows, shuffle=True, drop_last=True))
    gc.collect()
    torch.cuda.empty_cache()
    return clock.seconds, clock.memory


def forward(precision: str) -> tuple[float, float]:
    """Seconds of a forward pass of the candidates, and peak memory in GiB."""
    module = LanguageModel().cuda().eval()
    batch = {
        name: torch.stack([row[name] for row in texts()[:CANDIDATES]]).cuda()
        for name in ("input_ids", "attention_mask")
    }
    dtype = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(precision)
    with torch.no_grad(), torch.autocast("cuda", dtype, enabled=dtype is not None):
        for i in range(LAST):
            if i == FIRST:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                began = time.perf_counter()
            module.model(**batch)
        torch.cuda.synchronize()
    return (time.perf_counter() - began) / (LAST - FIRST), torch.cuda.max_memory_allocated() / 2**30


def online(precisions: list[str], repeats: int) -> list[dict[str, Any]]:
    """Each rule's step against the ideal."""
    with tempfile.TemporaryDirectory() as folder:
        concepts = os.path.join(folder, "concepts.arrow")
        ConceptIndex.from_lists([i % 50, 50 + i % 7] for i in range(SAMPLES)).save(concepts)
        rules: dict[str, OnlineSelection] = {
            "uniform": UniformSelection(keep=KEEP),
            "highest loss": HardSampleSelection(keep=KEEP),
            "importance, gradient norm": HardSampleSelection(keep=KEEP, rule="importance", score="grad_norm"),
            "utility-diversity": UtilityDiversitySelection(keep=KEEP),
            "concept-aware": ConceptAwareSelection(keep=KEEP, concepts=concepts),
        }
        results = []
        for precision in precisions:
            runs: dict[str, Callable[[], tuple[float, float]]] = {
                "all candidates": lambda p=precision: fit(p, CANDIDATES),
                "as many as kept": lambda p=precision: fit(p, int(CANDIDATES * KEEP)),
                "forward": lambda p=precision: forward(p),
                **{name: lambda p=precision, r=rule: fit(p, CANDIDATES, r) for name, rule in rules.items()},
            }
            measured: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
            for _ in range(repeats):
                for name, work in runs.items():
                    measured[name].append(work())
            for name, pairs in measured.items():
                scores = name in rules and rules[name].has_scores
                ideal = [
                    kept[0] + scores * ahead[0]
                    for kept, ahead in zip(measured["as many as kept"], measured["forward"], strict=True)
                ]
                results.append(
                    {
                        "method": name,
                        "precision": precision,
                        "ms_per_step": 1e3 * statistics.median(seconds for seconds, _ in pairs),
                        "over_ideal": statistics.median(s / i for (s, _), i in zip(pairs, ideal, strict=True)) - 1
                        if name in rules
                        else None,
                        "speed_up": statistics.median(
                            full[0] / s for full, (s, _) in zip(measured["all candidates"], pairs, strict=True)
                        ),
                        "peak_GiB": max(memory for _, memory in pairs),
                    }
                )
                print(json.dumps(results[-1]), flush=True)
    return results


def norms() -> list[dict[str, Any]]:
    """Nuclear norms of the candidates' outputs by the head's input, by products and by eigenvalues."""
    g = torch.Generator("cuda").manual_seed(0)
    hidden = torch.randn(CANDIDATES, TOKENS, 1024, generator=g, device="cuda")
    gram = gram_of_head(torch.randn(WORDS, 1024, generator=g, device="cuda") / 32, dtype=torch.float64)
    works: dict[str, Callable[[], Any]] = {
        "products": lambda: nuclear_norm_from_hidden(hidden, gram),
        "eigenvalues": lambda: torch.linalg.eigvalsh(hidden @ gram.float() @ hidden.mT),
    }
    results = []
    for name, work in works.items():
        times = []
        for _ in range(4):
            torch.cuda.synchronize()
            began = time.perf_counter()
            work()
            torch.cuda.synchronize()
            times.append(time.perf_counter() - began)
        results.append({"method": f"nuclear norms by {name}", "ms": 1e3 * statistics.median(times[1:])})
        print(json.dumps(results[-1]), flush=True)
    return results


def instances(sizes: list[int]) -> list[dict[str, Any]]:
    """Selectors on the GPU and on the CPU."""
    results = []
    for n in sizes:
        x, y = clusters(n)
        for device in ("cuda", "cpu"):
            there = torch.from_numpy(x).to(device)
            works = {
                "graph of 4 views": lambda t=there: hashing.multi_view(
                    t, K, VIEWS, CAPACITY, torch.Generator().manual_seed(0)
                ),
                "coverage": lambda x=x, y=y, d=device: CoverageInstanceSelector(random_state=0, device=d).fit(x, y),
            }
            if device == "cuda" and n <= 100_000:
                works["graph attention, default"] = lambda x=x, y=y, d=device: GraphAttentionInstanceSelector(
                    random_state=0, device=d
                ).fit(x, y)
            for name, work in works.items():
                if n <= 100_000:
                    work()
                torch.cuda.reset_peak_memory_stats()
                times = []
                for _ in range(3 if n <= 10_000 else 1):
                    began = time.perf_counter()
                    work()
                    torch.cuda.synchronize()
                    times.append(time.perf_counter() - began)
                results.append(
                    {
                        "method": name,
                        "samples": n,
                        "device": device,
                        "seconds": statistics.median(times),
                        "peak_GiB": torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else None,
                    }
                )
                print(json.dumps(results[-1]), flush=True)
    return results


def report(found: dict[str, Any]) -> str:
    """Markdown tables of what was measured."""
    online, rest = found["online"], found["instances"]
    lines = [
        "<!-- made by `make results` -->",
        "# On a GPU",
        "",
        f"{found['device']}, {found['cores']} CPU cores, torch {found['torch']}; `{found['command']}`.",
        "The tests marked `gpu` that there were then passed on it: each callback trains in fp32, bf16 and fp16, and",
        "the host waits for the GPU no more often than in training alone, but once a round of the delta rule.",
        "",
        f"A decoder of 12 layers of 1024, {CANDIDATES} candidates of {TOKENS} tokens,",
        f"{CANDIDATES * KEEP:.0f} trained on.",
        "The ideal is a forward pass of the candidates where a rule needs one, and a step of training on as many.",
        "",
        "| | precision | ms a step | over the ideal | speed-up over all candidates | peak GiB |",
        "|---|---|---|---|---|---|",
        *(
            f"| {r['method']} | {r['precision']} | {r['ms_per_step']:.0f} | "
            f"{'' if r['over_ideal'] is None else format(r['over_ideal'], '+.0%')} | {r['speed_up']:.2f} | "
            f"{r['peak_GiB']:.1f} |"
            for r in online
        ),
        "",
        "Nuclear norms of the candidates of utility-diversity selection: "
        + ", ".join(f"{r['method'].removeprefix('nuclear norms ')} {r['ms']:.0f} ms" for r in found["norms"])
        + ".",
        "",
        "Instance selection, 64 features, seconds (peak GiB of the GPU):",
        "",
        "| samples | | GPU | CPU |",
        "|---|---|---|---|",
    ]
    there = {(r["samples"], r["method"], r["device"]): r for r in rest}
    for (n, method, device), r in there.items():
        if device == "cuda":
            here = there.get((n, method, "cpu"))
            cpu = "" if here is None else f"{here['seconds']:.2g}"
            lines.append(f"| {n:,} | {method} | {r['seconds']:.2g} ({r['peak_GiB']:.1f}) | {cpu} |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    do = parser.add_mutually_exclusive_group(required=True)
    do.add_argument("--output", type=Path)
    do.add_argument("--report", type=Path)
    parser.add_argument("--precision", nargs="+", default=["bf16-mixed", "16-mixed"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--samples", nargs="+", type=int, default=[10_000, 100_000, 1_000_000])
    options = parser.parse_args()
    if options.report is not None:
        print(report(json.loads(options.report.read_text())))
        raise SystemExit
    if not torch.cuda.is_available():
        raise SystemExit("This benchmark needs a CUDA device.")
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    found = {
        "device": torch.cuda.get_device_name(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "command": f"python benchmarks/gpu.py --precision {' '.join(options.precision)} --repeats {options.repeats}",
        "norms": norms(),
        "instances": instances(options.samples),
        "online": online(options.precision, options.repeats),
    }
    options.output.write_text(json.dumps(found, indent=1))
