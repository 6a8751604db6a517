"""The clipped policy-gradient objective of PPO, per token (arXiv 1707.06347, eq. 7), and the KL estimate k3."""

from torch import Tensor


def importance_ratio(log_probs: Tensor, old_log_probs: Tensor) -> Tensor:
    r"""The ratio of the probability of each token under the current weights to that under the sampling weights.

    .. math:: \rho = \pi(t) / \pi_\text{old}(t)

    Args:
        log_probs: fp32 ``[N]``, the log-probability of each token under the current weights.
        old_log_probs: fp32 ``[N]``, the same under the weights that sampled the tokens.

    Returns:
        fp32 ``[N]``.
    """
    return (log_probs - old_log_probs).exp()


def clipped_objective(ratio: Tensor, advantage: Tensor, clip_low: float, clip_high: float) -> Tensor:
    r"""The clipped objective of each token, which is to be maximised (arXiv 1707.06347, eq. 7).

    .. math:: \min(\rho A, \operatorname{clip}(\rho, 1 - \epsilon_\text{low}, 1 + \epsilon_\text{high}) A)

    Args:
        ratio: fp32 ``[N]``, the importance ratio ``rho`` of each token.
        advantage: fp32 ``[N]``, the weighted advantage ``A`` of each token.
        clip_low: The ratio is clipped at ``1 - clip_low``.
        clip_high: The ratio is clipped at ``1 + clip_high``.

    Returns:
        fp32 ``[N]``. A value below ``ratio * advantage`` is clipped and has no gradient.

    Example:
        >>> import torch
        >>> clipped_objective(torch.tensor([0.5, 1.0, 2.0]), torch.ones(3), 0.2, 0.2)
        tensor([0.5000, 1.0000, 1.2000])
    """
    return (ratio * advantage).minimum(ratio.clamp(1 - clip_low, 1 + clip_high) * advantage)


def kl_estimate(log_probs: Tensor, reference_log_probs: Tensor) -> Tensor:
    r"""The estimate k3 of the KL divergence from a reference policy at each token (GRPO, arXiv 2402.03300, eq. 4).

    .. math:: \frac{\pi_\text{ref}}{\pi} - \log \frac{\pi_\text{ref}}{\pi} - 1

    It is never negative, and unbiased over tokens that the current weights sample.

    Args:
        log_probs: fp32 ``[N]``, the log-probability of each token under the current weights.
        reference_log_probs: fp32 ``[N]``, the same under the reference policy.

    Returns:
        fp32 ``[N]``.
    """
    log_ratio = reference_log_probs - log_probs
    return log_ratio.exp() - log_ratio - 1
