"""Contrastive training of pairs: a loss over large batches, with the memory of small ones."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from curation.batch import batch_size, leaves, take_rows
from curation.checks import check_integer


def micro_batched(encoder: Callable[[Any], Tensor], inputs: Any, size: int) -> Tensor:
    """Embeddings of a large batch, with the activations of one micro-batch in memory at a time.

    A contrastive loss needs the embeddings of all samples at once, but not their activations: each micro-batch is
    encoded without them, and again in the backward pass. The gradient is that of the full batch, as with gradient
    caching (arXiv 2101.06983), in one ordinary backward pass: it works in Lightning's automatic optimisation, under
    autocast and under DDP. Random layers draw anew for every micro-batch, and the same again in the backward pass.
    A batch of at most ``size`` samples is encoded as it is.

    Memory: the inputs, the embeddings and one micro-batch's activations. Cost: a second forward pass.

    Layers that mix the samples of a batch, such as BatchNorm in training mode, would see micro-batches, and update
    their running statistics twice; use GroupNorm or LayerNorm.

    Args:
        encoder: Maps inputs to embeddings ``[B, D]``, each from its own sample.
        inputs: Argument of the encoder: tensors ``[B, ...]`` in any nesting of mappings, tuples and lists
            (:func:`curation.batch.take_rows`).
        size: Samples in a micro-batch; the last may have fewer.

    Returns:
        Embeddings ``[B, D]``.

    Raises:
        ValueError: If ``size`` is not an integer >= 1, or the inputs disagree on ``B``.

    Example:
        >>> micro_batched(torch.nn.Linear(3, 2), torch.zeros(5, 3), 2).shape
        torch.Size([5, 2])
    """
    check_integer("size", size, 1)
    samples = batch_size(inputs)
    if samples <= size:
        return encoder(inputs)

    def encode(rows: Tensor) -> Tensor:
        return encoder(take_rows(inputs, rows))  # in here, so that no copy of the rows is kept for the backward pass

    # `checkpoint` restores the random stream of the device that its arguments lie on.
    device = next(leaf.device for _, leaf in leaves(inputs) if isinstance(leaf, Tensor) and leaf.dim())
    rows = torch.arange(samples, device=device)
    return torch.cat([checkpoint(encode, part, use_reentrant=False) for part in rows.split(size)])


def contrastive_loss(image: Tensor, text: Tensor, scale: Tensor | float, positives: Tensor | None = None) -> Tensor:
    r"""Symmetric cross-entropy of pairs among all pairs of a batch (CLIP, arXiv 2103.00020, Fig. 3).

    .. math:: -\frac{1}{2B} \sum_i \frac{1}{|P_i|} \sum_{j \in P_i}
        \log \frac{e^{s_{ij}}}{\sum_k e^{s_{ik}}} + \text{the same with rows and columns exchanged}

    with ``s`` the scaled cosine similarities in fp32 (fp64 where the embeddings are) and ``P_i = {i}`` in CLIP.
    Several positives share the target probability of their row and of their column.

    Under DDP give it the embeddings of all ranks, gathered with their gradients
    (``self.all_gather(x, sync_grads=True).flatten(0, 1)`` in Lightning): the ranks' mean gradient is then that of one
    process with the whole batch.

    Args:
        image: Embeddings ``[B, D]``, of any length.
        text: Embeddings ``[B, D]`` of the paired texts.
        scale: Inverse temperature, a number or a scalar tensor.
        positives: bool ``[B, B]``, whether text ``j`` belongs to image ``i``, as where a text occurs twice; with at
            least one in each row and column. None for the pairs only.

    Returns:
        The loss, an fp32 or fp64 scalar.

    Raises:
        ValueError: If the embeddings, or the positives, have other shapes.

    Example:
        >>> contrastive_loss(torch.eye(2), torch.eye(2), 0.0)
        tensor(0.6931)
    """
    if image.dim() != 2 or image.shape != text.shape:
        raise ValueError(
            f"Argument `text` must have the shape of `image`, [B, D], but got {list(text.shape)} with "
            f"{list(image.shape)}."
        )
    square = 2 * [len(image)]
    if positives is not None and list(positives.shape) != square:
        raise ValueError(f"Argument `positives` must have shape {square}, but got {list(positives.shape)}.")
    logits = scale * similarity(image, text)
    if positives is None:
        positives = torch.eye(len(image), dtype=torch.bool, device=image.device)
    losses = [-(positives * logits.log_softmax(dim)).sum(dim) / positives.sum(dim) for dim in (0, 1)]
    return (losses[0] + losses[1]).mean() / 2


def similarity(image: Tensor, text: Tensor) -> Tensor:
    """Cosines ``[B, M]`` of embeddings ``[B, D]`` and ``[M, D]``, in fp32 or fp64, outside of autocast."""
    with torch.autocast(image.device.type, enabled=False):
        image, text = (F.normalize(x if x.dtype == torch.float64 else x.float(), dim=-1) for x in (image, text))
        return image @ text.T
