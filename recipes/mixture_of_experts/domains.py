"""Bytes of real text in several domains that a machine has already, such as manual pages in many languages."""

import glob
import gzip
import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from curation.recipes.rollouts.language_models import global_seed
from curation.recipes.sources import resolve
from curation.samplers.global_batch import GlobalBatchSampler


class Domains(LightningDataModule):
    """Texts of several domains in pieces ``{"input_ids": int64 [T], "domain": int64}``; a token is a byte.

    All files of a domain are read into memory, those with the same content once. Some are for validation alone, the
    same ones whatever the seed. Domains with too little text on this machine are left out, with a warning.

    Args:
        domains: A folder or a glob of each, by name; ``package:NAME/PATH`` begins in the folder of an installed
            module. Files that end in ``.gz`` are unpacked.
        length: ``T``.
        batch_size: Pieces of a micro-batch, per process.
        single_domain: All pieces of a micro-batch come from a domain that is drawn for it; otherwise a domain is
            drawn for each of them.
        holdout: Share of the files of each domain that are held out.
        val_pieces: Pieces of each domain in validation.
        num_workers: Of the data loaders.
        seed: Of the micro-batches; None for that of ``seed_everything``.

    Attributes:
        names: Of the domains there are, by number.

    Raises:
        ValueError: If an argument is out of its range, or fewer than two domains have text enough.
    """

    def __init__(
        self,
        domains: dict[str, str],
        length: int = 128,
        batch_size: int = 4,
        single_domain: bool = True,
        holdout: float = 0.1,
        val_pieces: int = 128,
        num_workers: int = 0,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("length", length, 2),
            ("batch_size", batch_size, 1),
            ("val_pieces", val_pieces, 1),
        ):
            if value < least:
                raise ValueError(f"Argument `{name}` must be >= {least}, but got {value!r}.")
        if not 0 < holdout < 1:
            raise ValueError(f"Argument `holdout` must be in (0, 1), but got {holdout!r}.")
        if seed is not None and seed < 0:
            raise ValueError(f"Argument `seed` must be >= 0 or None, but got {seed!r}.")
        self.domains = domains
        self.length = length
        self.batch_size = batch_size
        self.single_domain = single_domain
        self.holdout = holdout
        self.val_pieces = val_pieces
        self.num_workers = num_workers
        self.seed = seed
        self.names: list[str] = []
        self.train: Pieces | None = None

    def setup(self, stage: str) -> None:
        """Read, split and cut; once."""
        if self.train is not None:
            return
        names, train, val, short = [], [], [], []
        for name, source in self.domains.items():
            held, rest = split(read(source), self.holdout)
            x, of_val = cut(rest, self.length), cut(held, self.length)
            if len(x) and len(of_val) >= self.val_pieces:
                names.append(name)
                train.append(x)
                val.append(of_val[np.arange(self.val_pieces) * len(of_val) // self.val_pieces])  # from all of it
            else:
                short.append(f"{name} ({len(held) + len(rest)} files, {len(of_val)} held-out pieces)")
        if len(train) < 2:
            raise ValueError(
                "Argument `domains` must name at least two with text for training and `val_pieces` "
                f"({self.val_pieces}) held-out pieces of {self.length} bytes, but there are too few in "
                f"{', '.join(short) or 'none'}."
            )
        if short:
            rank_zero_warn(f"Domains: left out, with too little text on this machine: {', '.join(short)}.")
        sizes = [f"{name} {x.numel() / 1e6:.1f}" for name, x in zip(names, train, strict=True)]
        rank_zero_info(f"Domains: MB to train on, {', '.join(sizes)}.")
        self.names, self.train, self.val = names, Pieces(train), Pieces(val)

    def train_dataloader(self) -> DataLoader:
        """Micro-batches, as :class:`DomainSampler` draws them."""
        assert self.train is not None
        sampler = DomainSampler(self.train.sizes, self.batch_size, self.single_domain, global_seed(self.seed))
        return DataLoader(self.train, self.batch_size, sampler=sampler, num_workers=self.num_workers)

    def val_dataloader(self) -> DataLoader:
        """The held-out pieces, domain by domain."""
        return DataLoader(self.val, 64, num_workers=self.num_workers)


class Pieces(Dataset):
    """Pieces of text with the number of their domain.

    Args:
        parts: uint8 ``[N_d, T]`` of each domain.

    Attributes:
        sizes: ``N_d``.
    """

    def __init__(self, parts: Sequence[Tensor]) -> None:
        self.sizes = [len(part) for part in parts]
        self.x = torch.cat(list(parts))
        self.domain = torch.arange(len(parts)).repeat_interleave(torch.tensor(self.sizes))

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"input_ids": self.x[i].long(), "domain": self.domain[i]}


class DomainSampler(GlobalBatchSampler):
    """Yields the indices of batches, of one domain each or of any, with every domain as often, whatever its size.

    Domains and pieces are drawn with replacement, by seed, epoch and process only. An epoch has as many batches as
    there are in the data.

    Args:
        sizes: Pieces of each domain, which follow each other.
        batch_size: Pieces of a batch, per process.
        single_domain: One domain is drawn for a batch; otherwise one for each of its pieces.
        seed: Of the draws.
    """

    def __init__(self, sizes: Sequence[int], batch_size: int, single_domain: bool, seed: int) -> None:
        super().__init__(range(sum(sizes)), seed)
        self.sizes = np.array(sizes)
        self.starts = np.cumsum(self.sizes) - self.sizes
        self.batch_size = batch_size
        self.single_domain = single_domain

    def __len__(self) -> int:
        return self._batches * self.batch_size

    @property
    def _batches(self) -> int:
        return max(1, int(self.sizes.sum()) // (self.batch_size * self._place[1]))

    def __iter__(self) -> Iterator[int]:
        draw = np.random.default_rng((self.seed, self.epoch, self._place[0]))
        for _ in range(self._batches):
            domains = draw.integers(len(self.sizes), size=1 if self.single_domain else self.batch_size)
            yield from (self.starts[domains] + draw.integers(self.sizes[domains], size=self.batch_size)).tolist()


def read(source: str) -> list[bytes]:
    """Contents of the files of a domain, each once, in an order that depends on them alone.

    Args:
        source: As in :class:`Domains`; nothing is read where nothing is there.
    """
    if source.startswith("package:"):
        package, _, path = source.partition("/")
        try:
            source = os.path.join(glob.escape(resolve(package)), path)
        except ImportError:
            return []
    files: dict[Path, None] = {}  # links to the same file are common among manual pages
    for place in map(Path, glob.glob(os.path.expanduser(source), recursive=True)):
        files.update((file.resolve(), None) for file in (place.rglob("*") if place.is_dir() else [place]))
    found = {}
    for file in files:
        if file.is_file():
            content = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
            found[hashlib.sha256(content).digest()] = content
    return [found[digest] for digest in sorted(found)]


def split(files: list[bytes], holdout: float) -> tuple[list[bytes], list[bytes]]:
    """Files that are held out, at least one of two, and the others.

    Example:
        >>> split([b"a", b"b", b"c"], 0.1)
        ([b'a'], [b'b', b'c'])
    """
    held = max(1, round(holdout * len(files)))
    return files[:held], files[held:]


def cut(files: list[bytes], length: int) -> Tensor:
    """Files one after the other in pieces, without what is left over: uint8 ``[N, length]``.

    Example:
        >>> cut([b"ab", b"cde"], 2).tolist()
        [[97, 98], [99, 100]]
    """
    text = np.frombuffer(b"".join(files), np.uint8)
    pieces = len(text) // length
    return torch.from_numpy(text[: pieces * length].reshape(pieces, length).copy())
