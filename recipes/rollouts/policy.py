"""Reinforcement learning with verifiable rewards: a policy that learns from groups of its own answers."""

import copy
import time
import warnings
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from curation.callbacks.online.online_selection import wait_for
from curation.callbacks.rollouts.difficulty_adaptive_rollouts import gather
from curation.metrics.rollouts import PassAtK
from curation.recipes.rollouts.answers import Rollouts, answer_log_probs, packed
from curation.recipes.rollouts.language_models import LanguageModelSource, Text
from curation.recipes.rollouts.tasks import score
from curation.recipes.seeds import global_seed
from curation.rollouts.advantages import Baseline, Normalizer, advantages, loss_weights
from curation.rollouts.generation import Completions, PromptCache, generate, prefill

TABLE_ROWS = 32


class PolicyModule(LightningModule):
    """A causal language model that is rewarded for right answers.

    A step answers every prompt of its batch some times with the weights as they are, scores the answers with the
    ``task`` of the data module, and updates the weights by the clipped objective of PPO on advantages over the group
    (GRPO, arXiv 2402.03300). The batch is prompts alone, so nothing is generated ahead of its step.

    ``DifficultyAdaptiveRollouts`` decides how many answers a prompt gets; without it every prompt has ``rollouts``.
    Optimizes by hand: ``accumulate_grad_batches`` and the trainer's gradient clipping do not apply. Where every
    answer is right, or every one wrong, an update changes nothing; it counts nonetheless, but in 16-mixed precision.

    Args:
        source: Of the model and its text.
        rollouts: Answers to every prompt.
        max_new_tokens: Of an answer.
        temperature: Of the policy, in sampling and in training.
        lr: Learning rate of AdamW, constant.
        baseline: Of :func:`~curation.rollouts.advantages.advantages`.
        normalizer: Of :func:`~curation.rollouts.advantages.loss_weights`.
        clip_low: The ratio of new to old probability is clipped at ``1 - clip_low``
        clip_high: and at ``1 + clip_high``.
        kl: Weight of the divergence from the policy at the start (k3), which then is kept; 0 for none.
        epochs: Passes over the answers of a step.
        mini_batches: Updates of a pass; 1 takes all answers at once (breadth, arXiv 2508.13755).
        token_budget: Tokens of a batch that is generated or trained on at a time.
        max_grad_norm: Of an update.
        eval_rollouts: Answers to every prompt in validation.
        warmup_steps: Steps of supervised training on solutions before everything else, batches of 64.
        warmup_lr: Learning rate of these.
        seed: Of sampling and of the warm-up; None for that of ``seed_everything``.

    Raises:
        ValueError: If an argument is out of its range.
        TypeError: If the strategy is neither one device nor DDP, or the data module has no ``task``.
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
    ) -> None:
        super().__init__()
        for name, value in (
            ("rollouts", rollouts), ("max_new_tokens", max_new_tokens), ("epochs", epochs),
            ("mini_batches", mini_batches), ("token_budget", token_budget), ("eval_rollouts", eval_rollouts),
        ):  # fmt: skip
            if value < 1:
                raise ValueError(f"Argument `{name}` must be >= 1, but got {value!r}.")
        for name, number in (
            ("temperature", temperature), ("lr", lr), ("max_grad_norm", max_grad_norm), ("warmup_lr", warmup_lr)
        ):  # fmt: skip
            if not number > 0:
                raise ValueError(f"Argument `{name}` must be > 0, but got {number!r}.")
        for name, number in (
            ("clip_low", clip_low),
            ("clip_high", clip_high),
            ("kl", kl),
            ("warmup_steps", warmup_steps),
        ):
            if not number >= 0:
                raise ValueError(f"Argument `{name}` must be >= 0, but got {number!r}.")
        self.save_hyperparameters(ignore="source")
        self.automatic_optimization = False
        self.source = source
        self.model: Any = None
        self.reference: Any = None
        self.text: Text
        self.rollouts_made = 0  # in training, by all processes
        self.lengths: dict[int, float] = {}  # of answers, by question: a running mean
        self.scored_wrongly = 0  # answers whose score failed
        self._cache: tuple[Any, PromptCache] | None = None
        self._calls = 0
        self._warm = False
        self._seed: int | None = seed
        self._steps = 0  # of training, whether or not they taught anything
        self._norm = torch.zeros(())
        self._hard: Tensor | None = None
        self._last: tuple[list[str], Rollouts] | None = None
        ks = sorted({1, eval_rollouts})
        self.metrics = nn.ModuleDict(
            {f"{part}_{k}": PassAtK(k) for part in ("val", "val_hard", "seen", "seen_hard") for k in ks}
        )

    # ------------------------------------------------------------------ the model

    def setup(self, stage: str) -> None:
        """Refuse data that cannot score answers."""
        self._seed = global_seed(self._seed)
        if not hasattr(getattr(self.trainer, "datamodule", None), "task"):
            raise TypeError(
                "PolicyModule needs a data module with a `task`, such as `curation.recipes.rollouts.prompts.Prompts`."
            )

    def configure_model(self) -> None:
        """Make the model, and in a fit warm it up."""
        if not isinstance(self.trainer.strategy, (SingleDeviceStrategy, DDPStrategy)):
            raise TypeError(
                f"PolicyModule supports one device and DDP, but not {type(self.trainer.strategy).__name__}."
            )
        if self.model is None:
            self.model, self.text = self.source.build()
        if self.trainer.training and not self._warm:
            self._warm = True
            if self.hparams["warmup_steps"] and self.trainer.ckpt_path is None:
                self._warm_up()
        if self.hparams["kl"] and self.reference is None:
            self.reference = copy.deepcopy(self.model).requires_grad_(False).eval()

    def _warm_up(self) -> None:
        data, device = self.trainer.datamodule, self.trainer.strategy.root_device  # type: ignore[attr-defined]
        self.model.train()
        draw = np.random.default_rng(self._seed)
        self.model.to(device)
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=self.hparams["warmup_lr"])
        for _ in range(self.hparams["warmup_steps"]):
            solved = [data.solved(int(i)) for i in draw.integers(2**31, size=64)]
            pairs = [(self.text.prompt(question), self.text.answer(answer)) for question, answer in solved]
            questions, answers = zip(*pairs, strict=True)
            log_probs, _ = answer_log_probs(self.model, questions, answers, self.hparams["temperature"])
            optimizer.zero_grad()
            loss = -log_probs.mean()
            loss.backward()
            optimizer.step()
        rank_zero_info(f"PolicyModule: loss {float(loss.detach()):.3f} per token after its warm-up.")

    def configure_optimizers(self) -> Any:
        """AdamW without weight decay."""
        return torch.optim.AdamW(self.model.parameters(), lr=self.hparams["lr"], weight_decay=0.0)

    # ------------------------------------------------------------------ answers

    def rollout(self, batch: dict[str, Any], counts: np.ndarray) -> Rollouts:
        """Answers of the policy as it is, with their rewards.

        A second call with the same batch does not run the prompts through the model again.

        Args:
            batch: ``ids`` int64 ``[P]`` and ``questions``.
            counts: int64 ``[P]``, answers to each.
        """
        if self._cache is None or self._cache[0] is not batch:
            prompts = [self.text.prompt(question) for question in batch["questions"]]
            self._cache = batch, prefill(self.model, prompts, self.text.pad_id, self.hparams["token_budget"])
            self._calls = 0
        self._calls += 1
        evaluates = not self.trainer.training
        key: list[Any] = [self._seed, evaluates, self._steps, self.global_rank, self._calls]
        if evaluates:
            key.append(int(batch["ids"][0]))
        generator = torch.Generator(self.device).manual_seed(int(np.random.SeedSequence(key).generate_state(1)[0]))
        ids = batch["ids"].tolist()
        known = [self.lengths.get(i, float(self.hparams["max_new_tokens"])) for i in ids]
        completions = generate(
            self.model,
            self._cache[1],
            np.asarray(counts),
            max_new_tokens=self.hparams["max_new_tokens"],
            stop_ids=self.text.stop_ids,
            token_budget=self.hparams["token_budget"],
            generator=generator,
            temperature=self.hparams["temperature"],
            expected_lengths=np.array(known),
        )
        of, lengths = completions.prompts.tolist(), completions.lengths.tolist()
        texts = [self.text.decode(row[:n]) for row, n in zip(completions.tokens.tolist(), lengths, strict=True)]
        task = self.trainer.datamodule.task  # type: ignore[attr-defined]
        scored = [score(task, ids[p], text) for p, text in zip(of, texts, strict=True)]
        wrong = [error for _, error in scored if error is not None]
        if wrong and not self.scored_wrongly:
            rank_zero_warn(f"An answer could not be scored and counts as wrong: {wrong[0]}. Others are counted only.")
        self.scored_wrongly += len(wrong)
        return Rollouts(completions, torch.tensor([reward for reward, _ in scored]), texts)

    # ------------------------------------------------------------------ learning

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Answer, score, update."""
        began = time.perf_counter()
        self._cache = None  # it would be of other weights
        rollouts = self.rollout(batch, np.full(len(batch["ids"]), self.hparams["rollouts"]))
        self._cache = None
        self._steps += 1
        self._remember_lengths(batch["ids"], rollouts)
        generated = time.perf_counter()
        self._last = batch["questions"], rollouts
        statistics = self._learn(batch, rollouts)
        wait_for(self.device)
        made = torch.tensor([len(rollouts.rewards), self.scored_wrongly], device=self.device)
        made, wrong = self.trainer.strategy.reduce(made, reduce_op="sum").tolist()
        self.rollouts_made += int(made)
        completions = rollouts.completions
        assert completions.log_probs is not None
        tokens = float(completions.lengths.sum())
        self.log_dict(
            {
                "rollouts/total": float(self.rollouts_made),
                "rollouts/reward": rollouts.rewards.mean(),
                "rollouts/tokens": tokens,
                "rollouts/length": tokens / len(rollouts.rewards),
                "rollouts/finished": completions.finished.float().mean(),
                "rollouts/entropy": -completions.log_probs.sum() / tokens,
                "rollouts/not_scored": float(wrong),
                "rollouts/seconds_answering": generated - began,
                "rollouts/seconds_learning": time.perf_counter() - generated,
                **statistics,
            },
            batch_size=len(batch["ids"]),
        )

    def _remember_lengths(self, ids: Tensor, rollouts: Rollouts) -> None:
        """The same on all processes, since a checkpoint has those of the first."""
        of, lengths = rollouts.prompts.numpy(), rollouts.completions.lengths.cpu().numpy()
        mean = np.bincount(of, lengths, len(ids)) / np.bincount(of, minlength=len(ids))
        for i, length in zip(*gather(self.trainer, ids, mean)[:2], strict=True):
            self.lengths[i] = 0.9 * self.lengths.get(i, float(length)) + 0.1 * float(length)

    def _learn(self, batch: dict[str, Any], rollouts: Rollouts) -> dict[str, Any]:
        size, of = len(batch["ids"]), rollouts.prompts
        rollouts = rollouts.cpu()
        advantage = advantages(rollouts.rewards, of, size, self.hparams["baseline"])
        updates = []
        for _ in range(self.hparams["epochs"]):
            for prompts in torch.arange(size).tensor_split(min(self.hparams["mini_batches"], size)):
                rows = ((of >= prompts[0]) & (of <= prompts[-1])).nonzero()[:, 0]
                updates.append(self._update(batch, rollouts, advantage, rows))
        taught = [found for found in updates if found]
        names = taught[0] if taught else {}
        return {f"policy/{name}": torch.stack([found[name] for found in taught]).mean() for name in names}

    def _update(
        self, batch: dict[str, Any], rollouts: Rollouts, advantage: Tensor, rows: Tensor
    ) -> dict[str, Tensor]:
        """One step of the optimizer, by the rollouts whose groups teach; as many passes on every process."""
        completions, of = rollouts.completions, rollouts.prompts
        lengths = completions.lengths
        weights, denominator = loss_weights(
            advantage[rows], of[rows], len(batch["ids"]), lengths[rows],
            self.hparams["normalizer"], self.hparams["max_new_tokens"],
        )  # fmt: skip
        taught = weights.new_zeros(len(batch["ids"])).index_add_(0, of[rows], weights.abs()) > 0
        used = taught[of[rows]]
        prompts = [self.text.prompt(question) for question in batch["questions"]]
        width = torch.tensor([len(prompt) for prompt in prompts])[of[rows]] + lengths[rows]
        parts = list(packed(rows[used], width[used], self.hparams["token_budget"]))
        strategy: Any = self.trainer.strategy
        whole = float(strategy.reduce(denominator.to(self.device), reduce_op="sum"))
        passes = int(strategy.reduce(torch.tensor(len(parts), device=self.device), reduce_op="max"))
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        if not whole:  # every group of every process is all right or all wrong
            if getattr(self.trainer.precision_plugin, "scaler", None) is None:  # which needs gradients
                optimizer.step()  # of nothing: it counts, and changes nothing
            return {}
        weight_of = weights.new_zeros(len(of)).index_put_((rows,), weights) * self.trainer.world_size / whole
        sums: dict[str, Tensor] = {}
        for i in range(passes):
            part = parts[i] if i < len(parts) else rows[:1]  # others are not done yet: nothing, but in step with them
            weight = weight_of[part] if i < len(parts) else weight_of.new_zeros(1)
            with strategy.block_backward_sync() if i < passes - 1 and self.trainer.world_size > 1 else nullcontext():
                loss, found = self._loss(prompts, completions, of, part, weight, self.trainer.world_size / whole)
                self.manual_backward(loss)
            for name, value in found.items():
                sums[name] = sums.get(name, torch.zeros((), device=self.device)) + value
        optimizer.step()
        tokens = sums.pop("tokens").clamp(min=1)
        loss = sums.pop("loss")
        return {"loss": loss, "grad_norm": self._norm, **{name: value / tokens for name, value in sums.items()}}

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """Clip the gradient, which is no longer scaled here."""
        self._norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.hparams["max_grad_norm"])

    def _loss(
        self, prompts: list[Tensor], completions: Completions, of: Tensor, rows: Tensor, weight: Tensor, share: float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The clipped objective of some rollouts, to be minimised."""
        assert completions.log_probs is not None
        ends = list(zip(rows.tolist(), completions.lengths[rows].tolist(), strict=True))
        answers = [completions.tokens[r, :n] for r, n in ends]
        questions = [prompts[int(of[r])] for r in rows.tolist()]
        new, row = answer_log_probs(self.model, questions, answers, self.hparams["temperature"])
        old = torch.cat([completions.log_probs[r, :n] for r, n in ends]).to(self.device)
        a = weight.to(self.device)[row]
        ratio = (new - old).exp()
        clipped = ratio.clamp(1 - self.hparams["clip_low"], 1 + self.hparams["clip_high"])
        loss = -torch.minimum(ratio * a, clipped * a).sum()
        counts = (a != 0).float()
        statistics = {
            "tokens": counts.sum(),
            "clipped": ((clipped * a < ratio * a) * counts).sum(),
            "ratio": (ratio.detach() * counts).sum(),
        }
        if self.reference is not None:
            with torch.no_grad():
                theirs, _ = answer_log_probs(self.reference, questions, answers, self.hparams["temperature"])
            k3 = ((theirs - new).exp() - (theirs - new) - 1) * counts
            loss = loss + self.hparams["kl"] * share * k3.sum()
            statistics["kl"] = k3.detach().sum()
        return loss, {"loss": loss.detach(), **statistics}

    # ------------------------------------------------------------------ evaluation

    def validation_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Answer every prompt as often, whatever its difficulty, so that pass@k can be estimated."""
        n, task = self.hparams["eval_rollouts"], self.trainer.datamodule.task  # type: ignore[attr-defined]
        rewards = self.rollout(batch, np.full(len(batch["ids"]), n)).rewards.view(-1, n).to(self.device)
        self._cache = None
        part = "seen" if dataloader_idx else "val"
        if self._hard is None:
            levels = np.array([task.difficulty(i) if hasattr(task, "difficulty") else 0 for i in range(len(task))])
            self._hard = torch.from_numpy((levels >= np.quantile(levels, 0.75)) & (levels > levels.min()))
        hard = self._hard[batch["ids"].cpu()]
        for k in {1, n}:
            self.metrics[f"{part}_{k}"].update(rewards)  # type: ignore[operator]
            if hard.any():
                self.metrics[f"{part}_hard_{k}"].update(rewards[hard.to(self.device)])  # type: ignore[operator]

    def on_validation_epoch_end(self) -> None:
        """Log pass@1 and pass@k of held-out prompts, of some that are trained on, and of the hardest quarter."""
        for name, metric in self.metrics.items():
            assert isinstance(metric, PassAtK)
            with warnings.catch_warnings():  # of processes that had no such prompt; all must compute
                warnings.simplefilter("ignore")
                value = metric.compute()
            if not value.isnan():
                part, _, k = name.rpartition("_")
                self.log(f"{part}_pass_at_{k}", value, prog_bar=part == "val")
            metric.reset()

    # ------------------------------------------------------------------ what is left

    def on_fit_end(self) -> None:
        """Log some answers, hard prompts first."""
        if self._last is None:
            return
        questions, rollouts = self._last
        by_reward = rollouts.rewards.argsort(stable=True)[:TABLE_ROWS].tolist()
        of = rollouts.prompts.tolist()
        rows = [[questions[of[i]], rollouts.texts[i], float(rollouts.rewards[i])] for i in by_reward]
        for logger in self.loggers:
            if isinstance(logger, WandbLogger):
                logger.log_table("rollouts/completions", columns=["question", "answer", "reward"], data=rows)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what sampling depends on beside the weights."""
        checkpoint["rollouts"] = {
            "made": self.rollouts_made,
            "lengths": self.lengths,
            "steps": self._steps,
            "seed": self._seed,
            "scored_wrongly": self.scored_wrongly,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore that."""
        kept = checkpoint.get("rollouts")
        if kept is not None:  # else these are weights from elsewhere
            self.rollouts_made, self.lengths = kept["made"], dict(kept["lengths"])
            self._steps, self.scored_wrongly = kept["steps"], kept["scored_wrongly"]
            self._seed = kept["seed"]
