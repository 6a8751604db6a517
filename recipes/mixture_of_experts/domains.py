"""Real text in several domains from files that a machine already has, such as manual pages in many languages."""

import gzip
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from curation.checks import check_choice, check_flag, check_integer, check_number, check_seed
from curation.recipes.mixture_of_experts.text_sources import DOMAINS, NAMED, places
from curation.recipes.seeds import global_seed
from curation.recipes.sources import AUTO, found
from curation.samplers.global_batch import GlobalBatchSampler


class Domains(LightningDataModule):
    """Texts of several domains in pieces ``{"input_ids": int64 [T], "domain": int64}``; a token is a byte.

    All files of a domain are read into memory; files with the same content are read once. Some files are held out for
    validation, the same ones for every seed. Domains with too little text on this machine are left out, with a
    warning.

    Args:
        domains: A folder or a glob for the name of each domain; ``package:NAME/PATH`` begins in the folder of an
            installed module. Files that end in ``.gz`` are unpacked. Or ``"manual_pages"`` (in five languages, with
            the documentation and the sources of Python and the headers of torch), ``"packages"`` (five domains that
            installed packages bring along), or ``"auto"``, the first of these that the machine has all of.
        length: Number ``T`` of bytes in a piece, at least 2.
        batch_size: Number of pieces in a micro-batch, per process.
        single_domain: Whether all pieces of a micro-batch come from one domain that is drawn for it; otherwise a
            domain is drawn for each piece.
        holdout: Fraction of the files of each domain that are held out, in (0, 1).
        val_pieces: Number of pieces of each domain in validation.
        num_workers: Number of worker processes of a data loader.
        seed: Seed of the draws of micro-batches; None for that of ``seed_everything``.

    Attributes:
        names: Names of the domains that have enough text; a domain's number is its position.

    Raises:
        ValueError: If an argument is of the wrong type or out of its range, or fewer than two domains have enough
            text.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> folder = Path(tempfile.mkdtemp())
        >>> for name in ("ab", "cd"):
        ...     for i in range(2):
        ...         _ = (folder / f"{name}{i}").write_text(f"{i}" + 16 * name)
        >>> data = Domains({name: f"{folder}/{name}*" for name in ("ab", "cd")}, length=8, val_pieces=1, seed=0)
        >>> data.setup("fit")
        >>> batch = next(iter(data.train_dataloader()))
        >>> data.names, batch["input_ids"].shape, len(batch["domain"].unique())
        (['ab', 'cd'], torch.Size([4, 8]), 1)
    """

    auto_sources: ClassVar = {"domains": DOMAINS}

    def __init__(
        self,
        domains: dict[str, str] | str = AUTO,
        length: int = 128,
        batch_size: int = 4,
        single_domain: bool = True,
        holdout: float = 0.1,
        val_pieces: int = 128,
        num_workers: int = 0,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        domains = found(self.auto_sources, {"domains": domains})["domains"]
        if isinstance(domains, str):
            check_choice("domains", domains, (AUTO, *NAMED))
        self.domains: dict[str, str] = NAMED[domains] if isinstance(domains, str) else domains
        self.length = check_integer("length", length, 2)
        self.batch_size = check_integer("batch_size", batch_size, 1)
        self.single_domain = check_flag("single_domain", single_domain)
        self.holdout = check_number("holdout", holdout, "(0, 1)")
        self.val_pieces = check_integer("val_pieces", val_pieces, 1)
        self.num_workers = check_integer("num_workers", num_workers, 0)
        self.seed = check_integer("seed", seed, 0, 2**63, optional=True)
        self.names: list[str] = []
        self.train: Pieces | None = None

    def setup(self, stage: str) -> None:
        """Read the files, hold some out and cut them into pieces; once."""
        if self.train is not None:
            return
        names, train, val, short = [], [], [], []
        for name, source in self.domains.items():
            held_out, rest = split(read(source), self.holdout)
            pieces, val_pieces = cut(rest, self.length), cut(held_out, self.length)
            if len(pieces) and len(val_pieces) >= self.val_pieces:
                names.append(name)
                train.append(pieces)
                spread = np.arange(self.val_pieces) * len(val_pieces) // self.val_pieces  # over all held-out text
                val.append(val_pieces[spread])
            else:
                short.append(f"{name} ({len(held_out) + len(rest)} files, {len(val_pieces)} held-out pieces)")
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
        """Micro-batches that :class:`DomainSampler` draws."""
        assert self.train is not None
        sampler = DomainSampler(self.train.sizes, self.batch_size, self.single_domain, global_seed(self.seed))
        return DataLoader(self.train, self.batch_size, sampler=sampler, num_workers=self.num_workers)

    def val_dataloader(self) -> DataLoader:
        """The held-out pieces, domain by domain."""
        return DataLoader(self.val, 64, num_workers=self.num_workers)


class Pieces(Dataset):
    """Pieces of text with the number of their domain.

    Args:
        parts: uint8 ``[N_d, T]`` for each domain: its ``N_d`` pieces of ``T`` bytes.

    Attributes:
        sizes: Number of pieces ``N_d`` of each domain.

    Example:
        >>> Pieces([torch.tensor([[97, 98]]).byte(), torch.tensor([[99, 100]]).byte()])[1]
        {'input_ids': tensor([ 99, 100]), 'domain': tensor(1)}
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
    """Yields the indices of batches of one domain each, or of any; every domain is drawn equally often.

    Domains and pieces are drawn with replacement. The draw depends on the seed, the epoch and the process only. An
    epoch has as many batches as fit into the data.

    Args:
        sizes: Number of pieces of each domain; the pieces of a domain follow each other.
        batch_size: Number of pieces in a batch, per process.
        single_domain: Whether one domain is drawn for a batch; otherwise one is drawn for each piece.
        seed: Seed of the random draws; equal on all ranks.

    Raises:
        ValueError: If an argument is of the wrong type or out of its range.

    Example:
        >>> sampler = DomainSampler([4, 400], batch_size=2, single_domain=True, seed=0)
        >>> list(sampler)[:8]  # the first domain has the indices 0 to 3
        [258, 208, 1, 0, 0, 0, 263, 369]
    """

    def __init__(self, sizes: Sequence[int], batch_size: int, single_domain: bool, seed: int) -> None:
        for size in sizes:
            check_integer("sizes", size, 1)
        super().__init__(range(sum(sizes)), check_seed(seed))
        self.sizes = np.array(sizes)
        self.starts = np.cumsum(self.sizes) - self.sizes
        self.batch_size = check_integer("batch_size", batch_size, 1)
        self.single_domain = check_flag("single_domain", single_domain)

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
    """The contents of the files of a domain, each once, in an order that depends on the contents alone.

    Args:
        source: A folder, a glob or ``package:NAME/PATH``, as in :class:`Domains`.

    Returns:
        The contents; empty where the source does not exist.
    """
    files: dict[Path, None] = {}  # links to the same file are common among manual pages
    for place in places(source):
        files.update((file.resolve(), None) for file in (place.rglob("*") if place.is_dir() else [place]))
    contents = {}
    for file in files:
        if file.is_file():
            content = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
            contents[hashlib.sha256(content).digest()] = content
    return [contents[digest] for digest in sorted(contents)]


def split(files: list[bytes], holdout: float) -> tuple[list[bytes], list[bytes]]:
    """Split files into those that are held out and the others.

    Args:
        files: The contents of the files.
        holdout: Fraction of the files that are held out; at least one is.

    Example:
        >>> split([b"a", b"b", b"c"], 0.1)
        ([b'a'], [b'b', b'c'])
    """
    count = max(1, round(holdout * len(files)))
    return files[:count], files[count:]


def cut(files: list[bytes], length: int) -> Tensor:
    """Concatenate files and cut them into pieces; bytes that do not fill a piece are dropped.

    Args:
        files: The contents of the files.
        length: Number of bytes in a piece.

    Returns:
        uint8 ``[N, length]``.

    Example:
        >>> cut([b"ab", b"cde"], 2).tolist()
        [[97, 98], [99, 100]]
    """
    text = np.frombuffer(b"".join(files), np.uint8)
    pieces = len(text) // length
    return torch.from_numpy(text[: pieces * length].reshape(pieces, length).copy())
