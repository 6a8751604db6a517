"""Reinforcement learning with verifiable rewards: a policy that learns from groups of its own answers."""

import copy
import dataclasses
import time
from contextlib import nullcontext
from typing import Any, Literal, get_args

import numpy as np
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from curation.callbacks import DifficultyAdaptiveRollouts
from curation.callbacks.lightning.collectives import gather_rows
from curation.callbacks.lightning.loggers import log_table
from curation.callbacks.lightning.loop import wait_for
from curation.checks import check_choice, check_integer, check_number, check_seed
from curation.recipes.causal_lm import OwnLogits, evaluation_mode, own_logits
from curation.recipes.lora import Lora, add_adapters, check_lora
from curation.recipes.rollouts.answers import Rollouts, answer_log_probs, check_sampling, packed
from curation.recipes.rollouts.evaluation import SolvedPrompts
from curation.recipes.rollouts.language_models import LanguageModelSource, Text
from curation.recipes.rollouts.objective import clipped_objective, importance_ratio, kl_estimate
from curation.recipes.rollouts.rewards import score
from curation.recipes.rollouts.tasks import Task
from curation.recipes.rollouts.warm_up import warm_up
from curation.recipes.seeds import global_seed
from curation.rollouts.advantages import Baseline, Normalizer, advantages, loss_weights
from curation.rollouts.generation import PromptCache, generate, prefill
from curation.rollouts.max_variance import max_variance

TABLE_ROWS = 32


class PolicyModule(LightningModule):
    """A causal language model that is rewarded for correct answers.

    A step answers every prompt of its batch several times with the current weights, scores the answers with the
    ``task`` of the data module, and updates the weights by the clipped objective of PPO with advantages over the
    group (GRPO, arXiv 2402.03300). A batch holds prompts alone, so nothing is generated ahead of its step.

    Answers are sampled and learned from with the model's own logits, its soft caps, scales and adapters included, and
    in evaluation mode, without dropout; the supervised warm-up alone runs in training mode.

    ``DifficultyAdaptiveRollouts`` decides how many answers a prompt gets; without it every prompt has ``rollouts``.
    The optimization is manual: ``accumulate_grad_batches`` and the trainer's gradient clipping do not apply. Where
    all answers of all prompts are correct, or all are wrong, an update changes nothing; it counts as a step
    nonetheless, except in 16-mixed precision.

    Args:
        source: The model and its tokenizer.
        rollouts: Number of answers to every prompt in training.
        max_new_tokens: Largest number of tokens of an answer.
        temperature: Divisor of the logits, in sampling and in training.
        lr: Learning rate of AdamW, constant.
        baseline: Baseline of the advantages, see :func:`~curation.rollouts.advantages.advantages`.
        normalizer: Denominator of the loss, see :func:`~curation.rollouts.advantages.loss_weights`.
        clip_low: The importance ratio is clipped at ``1 - clip_low``.
        clip_high: The importance ratio is clipped at ``1 + clip_high``.
        kl: Weight of the KL divergence from the initial policy (k3), of which a copy is kept, frozen weights
            excepted; 0 for no copy.
        epochs: Number of passes over the answers of a step.
        mini_batches: Number of updates of a pass; 1 takes all answers at once (breadth, arXiv 2508.13755).
        token_budget: Largest number of tokens that are generated or trained on at a time.
        max_grad_norm: Largest norm of the gradient of an update; the gradient is scaled down to it.
        eval_rollouts: Number of answers to every prompt in validation.
        warmup_steps: Number of supervised steps on solutions before everything else, in batches of 64.
        warmup_lr: Learning rate of the supervised steps.
        seed: Seed of sampling and of the warm-up; None for that of ``seed_everything``.
        reward_seconds: Time limit in seconds for scoring an answer; an answer that exceeds it has reward 0.
        lora: Train adapters of low rank, as ``{"rank": 8, "targets": ["q_proj", "v_proj"], "alpha": 16}``, and
            nothing else, in the warm-up too (:class:`~curation.recipes.lora.Lora`); None trains all weights.
        fill: Dynamic sampling (DAPO, arXiv 2503.14476): prompts of the batch are answered until the rewards of this
            many, per process, differ, or none is left; as many at a time as are missing. None answers all.
        keep: Answers of a prompt that are updated on: ``"all"``, or ``"max_variance"``, those ``kept_answers`` whose
            rewards have the largest variance (PODS, arXiv 2504.13818), with the advantages over these alone.
        kept_answers: Number of them.

    Raises:
        ValueError: If an argument is out of its range.
        TypeError: If the strategy is neither one device nor DDP, the data module has no ``task``, or the model is
            none that answers can be learned from, see :func:`~curation.recipes.causal_lm.own_logits`.
        RuntimeError: If none of the first answers can be scored.
    """

    def __init__(
        self,
        source: LanguageModelSource,
        rollouts: int = 8,
        max_new_tokens: int = 32,
        temperature: float = 1.0,
        lr: float = 1e-5,
        baseline: Baseline = "centred",
        normalizer: Normalizer = "rollout",
        clip_low: float = 0.2,
        clip_high: float = 0.2,
        kl: float = 0.0,
        epochs: int = 1,
        mini_batches: int = 1,
        token_budget: int = 16384,
        max_grad_norm: float = 1.0,
        eval_rollouts: int = 32,
        warmup_steps: int = 0,
        warmup_lr: float = 1e-3,
        seed: int | None = None,
        reward_seconds: float = 5.0,
        lora: Lora | None = None,
        fill: int | None = None,
        keep: Literal["all", "max_variance"] = "all",
        kept_answers: int = 8,
    ) -> None:
        super().__init__()
        for name, least in (
            ("rollouts", 1), ("max_new_tokens", 1), ("epochs", 1), ("mini_batches", 1), ("token_budget", 1),
            ("eval_rollouts", 1), ("warmup_steps", 0), ("kept_answers", 1),
        ):  # fmt: skip
            check_integer(name, locals()[name], least)
        for name, interval in (
            ("temperature", "(0, inf)"), ("lr", "(0, inf)"), ("warmup_lr", "(0, inf)"), ("max_grad_norm", "(0, inf]"),
            ("clip_low", "[0, inf]"), ("clip_high", "[0, inf]"), ("kl", "[0, inf)"), ("reward_seconds", "(0, inf)"),
        ):  # fmt: skip
            check_number(name, locals()[name], interval)
        check_choice("baseline", baseline, get_args(Baseline))
        check_choice("normalizer", normalizer, get_args(Normalizer))
        check_integer("fill", fill, 1, optional=True)
        check_choice("keep", keep, ("all", "max_variance"))
        self._seed = None if seed is None else check_seed(seed)
        self._lora = check_lora(lora)
        self.save_hyperparameters(ignore="source")
        self.automatic_optimization = False
        self.source = source
        self.model: Any = None
        self.reference: Any = None
        self.text: Text
        self.logits: OwnLogits  # of the model
        self.rollouts_made = 0  # in training, by all processes
        self.tokens_made = 0  # of these
        self.lengths: dict[int, float] = {}  # question -> running mean of the lengths of its answers
        self.not_scored = 0  # answers whose score failed
        self._has_scored = False  # any answer, in this process
        self.solved = SolvedPrompts(eval_rollouts)
        self._cache: tuple[Any, PromptCache] | None = None  # a batch, and the keys and values of its prompts
        self._calls = 0  # of `rollout` with that batch
        self._warmed_up = False
        self._steps = 0  # of training, whether or not they changed the weights
        self._grad_norm = torch.zeros(())
        self.sample_losses: Tensor | None = None  # of the prompts of a step
        self._last: tuple[list[str], Rollouts] | None = None  # the questions and answers of the last step

    # ------------------------------------------------------------------ the model

    @property
    def task(self) -> Task:
        """The task of the data module."""
        return self.trainer.datamodule.task  # type: ignore[attr-defined]

    def setup(self, stage: str) -> None:
        """Refuse data that cannot score answers."""
        self._seed = global_seed(self._seed)
        if not hasattr(getattr(self.trainer, "datamodule", None), "task"):
            raise TypeError(
                "PolicyModule needs a data module with a `task`, such as `curation.recipes.rollouts.Prompts`."
            )
        callbacks = self.trainer.callbacks  # type: ignore[attr-defined]
        if self.hparams["fill"] is not None and any(isinstance(c, DifficultyAdaptiveRollouts) for c in callbacks):
            raise ValueError(
                f"Argument `fill` must be None beside DifficultyAdaptiveRollouts, which answers all prompts, but got "
                f"{self.hparams['fill']}."
            )

    def configure_model(self) -> None:
        """Build the model, and in a fit warm it up."""
        if not isinstance(self.trainer.strategy, (SingleDeviceStrategy, DDPStrategy)):
            raise TypeError(
                f"PolicyModule supports one device and DDP, but not {type(self.trainer.strategy).__name__}."
            )
        if self.model is None:
            model, self.text = self.source.build()
            self.model = add_adapters(model, self._lora)
            self.logits = own_logits(self.model)
            check_sampling(self.logits, self.text.pad_id)
        if self.trainer.training and not self._warmed_up:
            self._warmed_up = True
            if self.hparams["warmup_steps"] and self.trainer.ckpt_path is None:
                self.model.to(self.trainer.strategy.root_device)
                loss = warm_up(
                    self.logits, self.text, self.trainer.datamodule.solved, self.hparams["warmup_steps"],  # type: ignore[attr-defined]
                    self.hparams["warmup_lr"], self.hparams["temperature"], global_seed(self._seed),
                )  # fmt: skip
                rank_zero_info(f"PolicyModule: loss {loss:.3f} per token after its warm-up.")
        if self.hparams["kl"] and self.reference is None:
            frozen = {id(p): p for p in self.model.parameters() if not p.requires_grad}  # the same in both
            self.reference = copy.deepcopy(self.model, frozen).requires_grad_(False).eval()

    def configure_optimizers(self) -> Any:
        """AdamW without weight decay."""
        trained = [p for p in self.model.parameters() if p.requires_grad]
        return torch.optim.AdamW(trained, lr=self.hparams["lr"], weight_decay=0.0)

    # ------------------------------------------------------------------ answers

    def rollout(self, batch: dict[str, Any], counts: np.ndarray) -> Rollouts:
        """Answers by the current weights, with their rewards.

        A second call with the same batch does not run the prompts through the model again.

        Args:
            batch: ``ids``, int64 ``[P]``, and ``questions``, ``P`` texts.
            counts: int64 ``[P]``, the number of answers to each prompt.
        """
        if self._cache is None or self._cache[0] is not batch:
            prompts = [self.text.prompt(question) for question in batch["questions"]]
            self._cache = batch, prefill(self.model, prompts, self.text.pad_id, self.hparams["token_budget"])
            self._calls = 0
        self._calls += 1
        ids = batch["ids"].tolist()
        completions = generate(
            self.model,
            self._cache[1],
            np.asarray(counts),
            max_new_tokens=self.hparams["max_new_tokens"],
            stop_ids=self.text.stop_ids,
            token_budget=self.hparams["token_budget"],
            generator=self._generator(ids),
            temperature=self.hparams["temperature"],
            expected_lengths=np.array([self.lengths.get(i, float(self.hparams["max_new_tokens"])) for i in ids]),
        )
        lengths = completions.lengths.tolist()
        texts = [self.text.decode(row[:n]) for row, n in zip(completions.tokens.tolist(), lengths, strict=True)]
        rewards = self._rewards([ids[row] for row in completions.prompt_index.tolist()], texts)
        return Rollouts(completions, torch.tensor(rewards), texts)

    def _generator(self, ids: list[int]) -> torch.Generator:
        """The source of the draws of a call; it depends on the step and the rank, and in evaluation on the batch."""
        evaluates = not self.trainer.training
        key: list[Any] = [self._seed, evaluates, self._steps, self.global_rank, self._calls, *ids[: int(evaluates)]]
        return torch.Generator(self.device).manual_seed(int(np.random.SeedSequence(key).generate_state(1)[0]))

    def _rewards(self, questions: list[int], answers: list[str]) -> list[float]:
        """The reward of each answer; those that cannot be scored are counted and have reward 0."""
        limit = self.hparams["reward_seconds"]
        scored = [score(self.task, i, answer, limit) for i, answer in zip(questions, answers, strict=True)]
        errors = [error for _, error in scored if error is not None]
        if errors and len(errors) == len(scored):
            said = f"{type(self.task).__name__} could score none of {len(scored)} answers of a batch: {errors[0]}."
            if not self._has_scored:
                raise RuntimeError(f"{said} Repair its `score`, or raise `reward_seconds` where that is the limit.")
            rank_zero_warn(f"{said} They count as wrong, in step {self._steps}.")
        self._has_scored |= len(errors) < len(scored)
        if errors and not self.not_scored:
            rank_zero_warn(
                f"An answer could not be scored and counts as wrong: {errors[0]}. Others are counted only."
            )
        self.not_scored += len(errors)
        return [reward for reward, _ in scored]

    # ------------------------------------------------------------------ training

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Answer, score, update."""
        start, size = time.perf_counter(), len(batch["ids"])
        self._cache = None  # of the weights before the last update
        rollouts = self._answer(batch)
        self._cache = None
        self._steps += 1
        self._update_lengths(batch["ids"], rollouts)
        self.sample_losses = self._wrong_shares(rollouts, size)
        answered = time.perf_counter()
        self._last = batch["questions"], rollouts
        with evaluation_mode(self.model):  # dropout would change the probabilities that were sampled from
            statistics = self._learn(batch["questions"], rollouts)
        wait_for(self.device)
        completions = rollouts.completions
        assert completions.log_probs is not None
        tokens = int(completions.lengths.sum())
        counts = torch.tensor([len(rollouts.rewards), tokens, self.not_scored], device=self.device)
        made, all_tokens, not_scored = self.trainer.strategy.reduce(counts, reduce_op="sum").tolist()
        self.rollouts_made += int(made)
        self.tokens_made += all_tokens
        self.log_dict(
            {
                "rollouts/total": float(self.rollouts_made),
                "rollouts/reward": rollouts.rewards.mean(),
                "rollouts/silent": 1 - _with_signal(rollouts, size) / len(rollouts.prompt_index.unique()),
                "rollouts/tokens": float(tokens),
                "rollouts/tokens_total": float(self.tokens_made),
                "rollouts/length": tokens / len(rollouts.rewards),
                "rollouts/finished": completions.finished.float().mean(),
                "rollouts/entropy": -completions.log_probs.sum() / tokens,
                "rollouts/not_scored": float(not_scored),
                "rollouts/seconds_answering": answered - start,
                "rollouts/seconds_learning": time.perf_counter() - answered,
                **statistics,
            },
            batch_size=size,
        )

    def _answer(self, batch: dict[str, Any]) -> Rollouts:
        """Answers to the prompts of a batch; with ``fill`` to as many as have the wanted number with signal."""
        size, n = len(batch["ids"]), self.hparams["rollouts"]
        wanted = size if self.hparams["fill"] is None else self.hparams["fill"]
        rollouts, asked, missing = None, 0, wanted
        while missing and asked < size:
            counts = np.zeros(size, np.int64)
            counts[asked : asked + missing] = n
            more = self.rollout(batch, counts)
            rollouts = more if rollouts is None else rollouts.pool(more)
            asked += missing
            missing = wanted - _with_signal(rollouts, size)
        assert rollouts is not None
        return rollouts

    def _wrong_shares(self, rollouts: Rollouts, prompts: int) -> Tensor:
        """One minus the mean reward of each prompt, fp32 ``[P]``: what ``DynamicDataPruning`` remembers.

        NaN for a prompt that was not answered.
        """
        index, rewards = rollouts.prompt_index.cpu(), rollouts.rewards.cpu().float()
        means = torch.full((prompts,), torch.nan, dtype=torch.float32).index_reduce_(
            0, index, rewards, "mean", include_self=False
        )
        return (1 - means).to(self.device)

    def _update_lengths(self, ids: Tensor, rollouts: Rollouts) -> None:
        """Update the running means on all processes alike, since a checkpoint holds those of the first."""
        index, lengths = rollouts.prompt_index.numpy(), rollouts.completions.lengths.cpu().numpy()
        with np.errstate(invalid="ignore"):  # prompts that were not answered
            means = torch.from_numpy(np.bincount(index, lengths, len(ids)) / np.bincount(index, minlength=len(ids)))
        rows = gather_rows(self.trainer, ids).tolist(), gather_rows(self.trainer, means).tolist()
        for i, length in zip(*rows, strict=True):
            if not np.isnan(length):
                self.lengths[i] = 0.9 * self.lengths.get(i, length) + 0.1 * length

    def _learn(self, questions: list[str], rollouts: Rollouts) -> dict[str, Any]:
        """All updates of a step; the means of their statistics."""
        size, rollouts = len(questions), rollouts.cpu()
        if self.hparams["keep"] == "max_variance":
            kept = max_variance(rollouts.rewards, rollouts.prompt_index, size, self.hparams["kept_answers"])
            rollouts = rollouts.rows(kept.nonzero()[:, 0])
        index = rollouts.prompt_index
        prompts = [self.text.prompt(question) for question in questions]
        advantage = advantages(rollouts.rewards, index, size, self.hparams["baseline"])
        updates = []
        for _ in range(self.hparams["epochs"]):
            for part in torch.arange(size).tensor_split(min(self.hparams["mini_batches"], size)):
                rows = ((index >= part[0]) & (index <= part[-1])).nonzero()[:, 0]
                updates.append(self._update(prompts, rollouts, advantage, rows))
        changed = [statistics for statistics in updates if statistics]
        names = changed[0] if changed else {}
        return {f"policy/{name}": torch.stack([statistics[name] for statistics in changed]).mean() for name in names}

    def _update(
        self, prompts: list[Tensor], rollouts: Rollouts, advantage: Tensor, rows: Tensor
    ) -> dict[str, Tensor]:
        """One optimizer step on the rollouts of informative groups, in as many passes on every process."""
        index, lengths = rollouts.prompt_index[rows], rollouts.completions.lengths[rows]
        options = index, len(prompts), lengths, self.hparams["normalizer"], self.hparams["max_new_tokens"]
        weights, denominator = loss_weights(advantage[rows], *options)
        kl_weights, _ = loss_weights(torch.ones_like(weights), *options)
        informative = (weights.new_zeros(len(prompts)).index_add_(0, index, weights.abs()) > 0)[index]
        widths = torch.tensor([len(prompt) for prompt in prompts])[index] + lengths
        parts = list(packed(rows[informative], widths[informative], self.hparams["token_budget"]))
        strategy, processes = self.trainer.strategy, self.trainer.world_size
        total = float(strategy.reduce(denominator.to(self.device), reduce_op="sum"))
        passes = int(strategy.reduce(torch.tensor(len(parts), device=self.device), reduce_op="max"))
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        if not total:  # no group of any process is informative
            if getattr(self.trainer.precision_plugin, "scaler", None) is None:  # a scaler needs gradients
                optimizer.step()  # without gradients: it counts, and changes nothing
            return {}
        share = processes / total  # DDP takes the mean over processes
        columns = torch.stack([weights, kl_weights]) * share
        weight_of = weights.new_zeros(2, len(advantage)).index_copy_(1, rows, columns)
        width_of = widths.new_zeros(len(advantage)).index_put_((rows,), widths)
        self.passes_per_step = passes  # GlobalBatchLoadBalancing reads this, and the mask of each pass
        sums: dict[str, Tensor] = {}
        for i in range(passes):
            # A process without rows left runs one with weight 0, in step with the others.
            part, scale = (parts[i], 1.0) if i < len(parts) else (rows[:1], 0.0)
            width = width_of[part][:, None]
            self.token_mask = (torch.arange(int(width.max())) < width) & (scale > 0)
            accumulates = i < passes - 1 and processes > 1
            with strategy.block_backward_sync() if accumulates else nullcontext():  # type: ignore[attr-defined]
                loss, statistics = self._loss(prompts, rollouts, part, *(weight_of[:, part] * scale))
                self.manual_backward(loss)
            for name, value in statistics.items():
                sums[name] = sums.get(name, torch.zeros((), device=self.device)) + value
        optimizer.step()
        tokens, loss = sums.pop("tokens").clamp(min=1), sums.pop("loss")
        means = {name: value / tokens for name, value in sums.items()}
        return {"loss": loss, "grad_norm": self._grad_norm, **means}

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """Clip the gradient, from which the loss scale has been removed here."""
        self._grad_norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.hparams["max_grad_norm"])

    def _loss(
        self, prompts: list[Tensor], rollouts: Rollouts, rows: Tensor, weights: Tensor, kl_weights: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The negative clipped objective of some rollouts, and sums over their tokens.

        Args:
            prompts: The tokens of each prompt of the step.
            rollouts: The answers of the step, on the CPU.
            rows: int64 ``[r]``, the answers of this pass.
            weights: fp32 ``[r]``, the weighted advantage of each token of an answer.
            kl_weights: fp32 ``[r]``, the weight of each token of an answer in the mean of the KL divergence.
        """
        completions, temperature = rollouts.completions, self.hparams["temperature"]
        assert completions.log_probs is not None
        spans = list(zip(rows.tolist(), completions.lengths[rows].tolist(), strict=True))
        answers = [completions.tokens[row, :length] for row, length in spans]
        questions = [prompts[i] for i in rollouts.prompt_index[rows].tolist()]
        log_probs, answer_index = answer_log_probs(self.logits, questions, answers, temperature)
        old_log_probs = torch.cat([completions.log_probs[row, :length] for row, length in spans]).to(self.device)
        advantage = weights.to(self.device)[answer_index]
        ratio = importance_ratio(log_probs, old_log_probs)
        objective = clipped_objective(ratio, advantage, self.hparams["clip_low"], self.hparams["clip_high"])
        loss = -objective.sum()
        counts = (kl_weights != 0).float().to(self.device)[answer_index]
        statistics = {
            "tokens": counts.sum(),
            "clipped": ((objective < ratio * advantage) * counts).sum(),
            "ratio": (ratio.detach() * counts).sum(),
        }
        if self.reference is not None:
            with torch.no_grad():
                head = self.reference.get_output_embeddings()
                logits = dataclasses.replace(self.logits, model=self.reference, head=head)
                reference_log_probs, _ = answer_log_probs(logits, questions, answers, temperature)
            kl = kl_estimate(log_probs, reference_log_probs)
            loss = loss + self.hparams["kl"] * (kl * kl_weights.to(self.device)[answer_index]).sum()
            statistics["kl"] = (kl.detach() * counts).sum()
        return loss, {"loss": loss.detach(), **statistics}

    # ------------------------------------------------------------------ evaluation

    def validation_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Answer every prompt ``eval_rollouts`` times, whatever its difficulty: pass@k needs groups of one size."""
        n = self.hparams["eval_rollouts"]
        rewards = self.rollout(batch, np.full(len(batch["ids"]), n)).rewards.view(-1, n).to(self.device)
        self._cache = None
        self.solved.update("seen" if dataloader_idx else "val", batch["ids"], rewards, self.task)

    def on_validation_epoch_end(self) -> None:
        """Log pass@1 and pass@k of held-out prompts, of some that are trained on, and of the hardest quarter."""
        for name, rate in self.solved.compute().items():
            self.log(name, rate, prog_bar=name.startswith("val_pass_at_"))

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> Rollouts:
        """Answer every prompt ``rollouts`` times."""
        rollouts = self.rollout(batch, np.full(len(batch["ids"]), self.hparams["rollouts"]))
        self._cache = None
        return rollouts

    # ------------------------------------------------------------------ loggers and checkpoints

    def on_fit_end(self) -> None:
        """Log some answers of the last step, those with the lowest rewards first."""
        if self._last is None:
            return
        questions, rollouts = self._last
        index = rollouts.prompt_index.tolist()
        order = rollouts.rewards.argsort(stable=True)[:TABLE_ROWS].tolist()
        rows = [[questions[index[i]], rollouts.texts[i], float(rollouts.rewards[i])] for i in order]
        log_table(self.trainer, "rollouts/completions", ["question", "answer", "reward"], rows)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the state that sampling depends on, beside the weights."""
        checkpoint["rollouts"] = {
            "made": self.rollouts_made,
            "tokens": self.tokens_made,
            "lengths": self.lengths,
            "steps": self._steps,
            "seed": self._seed,
            "scored_wrongly": self.not_scored,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore that state."""
        state = checkpoint.get("rollouts")
        if state is not None:  # else the weights are from another module
            self.rollouts_made, self.lengths = state["made"], dict(state["lengths"])
            self.tokens_made = state.get("tokens", 0)  # of an earlier version
            self._steps, self.not_scored = state["steps"], state["scored_wrongly"]
            self._seed = state["seed"]


def _with_signal(rollouts: Rollouts, size: int) -> int:
    """The number of prompts whose rewards differ, of the ``size`` prompts of a batch."""
    index = rollouts.prompt_index
    return len(index[advantages(rollouts.rewards, index, size) != 0].unique())
