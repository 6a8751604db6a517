"""Rows of unequal number from two gloo ranks; as a script, this file is one of them."""

import sys
from pathlib import Path

import pytest
import torch
from helpers import trainer
from processes import on_two_ranks

from curation.callbacks.lightning.collectives import agree, average_over_processes, gather_rows, gather_sizes

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool]
SHAPES = [(), (3,), (2, 3)]
NUMBERS = [(2, 2), (1, 3), (3, 0), (0, 2), (0, 0)]  # rows of the ranks


def rows_of(rank: int, number: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return (torch.arange(number * torch.Size(shape).numel()) + 10 * rank).view(number, *shape).to(dtype)


@pytest.fixture(scope="module")
def gathered(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gathered")
    on_two_ranks(__file__, folder)
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


@pytest.mark.parametrize("numbers", NUMBERS, ids=str)
def test_rows_of_unequal_number_come_in_the_order_of_ranks(gathered, numbers):
    for dtype in DTYPES:
        for shape in SHAPES:
            expected = torch.cat([rows_of(rank, number, shape, dtype) for rank, number in enumerate(numbers)])
            for results in gathered:
                result = results["rows"][numbers, shape, dtype]
                assert result.dtype == dtype
                assert torch.equal(result, expected)


def test_sizes_come_in_the_order_of_ranks(gathered):
    assert [results["sizes"] for results in gathered] == [[5, 7]] * 2


def test_averages_keep_their_dtypes_and_are_finite(gathered):
    lowest = torch.finfo(torch.float32).min
    for results in gathered:
        extreme, exact, half, complex_one = results["averages"]
        assert torch.equal(extreme, torch.full((2,), lowest))
        assert torch.equal(exact, torch.tensor([1.5 + 2.0**-40], dtype=torch.float64))
        assert torch.equal(half, torch.tensor(0.5, dtype=torch.bfloat16))
        assert torch.equal(complex_one, torch.tensor([0.5 + 1.5j]))


def test_an_error_of_a_process_is_an_error_on_all(gathered):
    assert [results["agreed"] for results in gathered] == [0, 1]
    assert [results["error"] for results in gathered] == [
        "Another process failed at the same point; its error says why.",
        "only here",
    ]


def test_a_single_process_gets_its_own_rows():
    run, rows = trainer(), torch.rand(3, 2)
    assert gather_rows(run, rows) is rows
    assert gather_sizes(run, 3) == [3]
    assert agree(run, lambda: 4) == 4
    with pytest.raises(KeyError):
        agree(run, lambda: {}["missing"])


def averages_of(run, rank: int) -> list[torch.Tensor]:
    tensors = [
        torch.full((2,), torch.finfo(torch.float32).min),
        torch.tensor([1.0 + rank + 2.0**-40], dtype=torch.float64),
        torch.tensor(float(rank), dtype=torch.bfloat16),
        torch.tensor([rank + (1 + rank) * 1j]),
    ]
    average_over_processes(run, tensors)
    return tensors


def one_rank(folder: Path) -> None:
    run = trainer(devices=2, strategy="ddp")
    run.strategy.setup_environment()
    rank = run.global_rank

    def fail_on_rank_1() -> None:
        if rank == 1:
            raise ValueError("only here")

    rows = {
        (numbers, shape, dtype): gather_rows(run, rows_of(rank, numbers[rank], shape, dtype))
        for numbers in NUMBERS
        for shape in SHAPES
        for dtype in DTYPES
    }
    results = {"rows": rows, "sizes": gather_sizes(run, 5 + 2 * rank), "agreed": agree(run, lambda: rank)}
    results["averages"] = averages_of(run, rank)
    try:
        agree(run, fail_on_rank_1)
    except (RuntimeError, ValueError) as error:
        results["error"] = str(error)
    torch.save(results, folder / f"{rank}.pt")


if __name__ == "__main__":
    one_rank(Path(sys.argv[1]))
