"""Copies in flat buffers against the tensors they were copied from."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from gradscope.instruments import flat_copies
from gradscope.instruments.flat_copies import FlatCopies, can_be_copied, real_view, working_dtype

CPU = torch.device("cpu")


def copies_of(
    parameters: list[torch.Tensor], n_quantities: int = 4, dtype: torch.dtype = torch.float32
) -> FlatCopies:
    places = range(0, 2 * len(parameters), 2)
    return FlatCopies(CPU, dtype, places, parameters, n_quantities)


def some_parameters() -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [
        torch.randn(()),
        torch.randn(3, 4).T,
        torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        torch.randn(9)[::2],
        torch.randn(7).bfloat16(),
        torch.randn(2, requires_grad=True),
    ]


def test_copies_have_the_elements_in_their_order_whatever_the_memory_has() -> None:
    parameters = some_parameters()
    copies = copies_of(parameters)
    assert copies.turn == (0, 6)
    assert copies.names_of_dtypes == ["float32"] * 4 + ["bfloat16", "float32"]
    copies.copy_weights([p.detach() for p in parameters])
    assert copies.copy("weight_after", [p.detach() + 1 for p in parameters]).all()
    for member, parameter in enumerate(parameters):
        start, stop = map(int, copies.starts[member : member + 2])
        expected = parameter.detach().float()
        assert torch.equal(copies.shaped("weight_before", member), expected)
        assert torch.equal(copies.flat("weight_before", start, stop), expected.reshape(-1))
        one_more = (parameter.detach() + 1).float()
        assert torch.equal(copies.flat("weight_after", start, stop), one_more.reshape(-1))
        at = np.arange(start, stop)[::-1].copy()
        gathered = copies.gather("weight_after", at).value()
        assert np.array_equal(gathered, one_more.reshape(-1).flip(0).numpy())


def test_a_copy_does_not_follow_what_it_was_copied_from() -> None:
    parameter = torch.ones(3)
    copies = copies_of([parameter])
    copies.copy_weights([parameter])
    parameter.zero_()
    assert copies.shaped("weight_before", 0).tolist() == [1, 1, 1]


def test_absent_sparse_and_misshapen_tensors() -> None:
    shapes: list[tuple[int, ...]] = [(3,), (4, 2), (2,), (5,), (2, 2)]
    copies = copies_of([torch.zeros(shape) for shape in shapes])
    dense, other = torch.randn(3), torch.randn(2, 2)
    sparse = torch.sparse_coo_tensor([[1, 1, 3]], torch.randn(3, 2), (4, 2), check_invariants=True)
    misshapen, meta = torch.randn(9), torch.randn(5, device="meta")
    given = [dense, sparse, None, meta, other]
    assert copies.copy("g", given).tolist() == [True, True, False, False, True]
    assert torch.equal(copies.shaped("g", 0), dense)
    assert torch.equal(copies.shaped("g", 1), sparse.to_dense())
    assert torch.equal(copies.shaped("g", 4), other)
    assert not copies.copy("m", [None, None, misshapen, None, None]).any()


@pytest.mark.parametrize("conjugated", [False, True])
def test_complex_numbers_become_pairs(conjugated: bool) -> None:
    weight = torch.randn(3, 2, dtype=torch.complex64)
    if conjugated:
        weight = weight.conj()
    plain, scalar = torch.randn(4), torch.randn((), dtype=torch.complex64)
    copies = copies_of([weight, plain, scalar])
    assert copies.starts.tolist() == [0, 12, 16, 18]
    copies.copy_weights([weight, plain, scalar])
    plain_numbers = weight.resolve_conj().numpy()
    expected = np.stack([plain_numbers.real, plain_numbers.imag], -1)
    assert np.array_equal(copies.shaped("weight_before", 0).numpy(), expected)
    assert copies.copy("g", [weight, None, scalar]).tolist() == [True, False, True]
    assert copies.shaped("g", 2).tolist() == [scalar.real.item(), scalar.imag.item()]
    assert torch.equal(real_view(plain), plain)


def test_one_number_for_every_element() -> None:
    copies = copies_of([torch.zeros(2, 2), torch.zeros(3), torch.zeros(()), torch.zeros(1)])
    copies.spread("t", [torch.tensor(7.0), 3, None, torch.tensor([2.5])])
    assert copies.flat("t", 0, 9).tolist() == [7, 7, 7, 7, 3, 3, 3, 0, 2.5]


@pytest.mark.parametrize("most", [0, 40, 52])
@pytest.mark.parametrize("n_quantities", [1, 2, 3, 5, 9])
def test_turns_cover_everybody_and_keep_to_the_room(
    n_quantities: int, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flat_copies, "MOST_BYTES", most * torch.float32.itemsize)
    sizes = [10, 1, 5, 4, 30, 2]
    room = max(most, sum(sizes) // 4) // n_quantities
    parameters = [torch.arange(float(size)) for size in sizes]
    copies = copies_of(parameters, n_quantities)
    turns = []
    while copies.turn not in turns:
        turns.append(copies.turn)
        first, last = copies.turn
        copies.copy_weights(parameters)
        assert copies.copy("g", [-p for p in parameters[first:last]]).all()
        for member in range(first, last):
            start, stop = map(int, copies.starts[member : member + 2])
            assert torch.equal(copies.flat("g", start, stop), -parameters[member])
            assert torch.equal(copies.shaped("g", member), -parameters[member])
            assert copies.gather("g", np.array([stop - 1])).value().tolist() == [-sizes[member] + 1]
        for member, parameter in enumerate(parameters):
            assert torch.equal(copies.shaped("weight_before", member), parameter)
        copies.next_turn()
    assert [member for turn in turns for member in range(*turn)] == list(range(len(sizes)))
    for first, last in turns:
        assert last - first == 1 or sum(sizes[first:last]) <= room
    # None of them is smaller than it has to be.
    for (first, last), (_, after) in pairwise(turns):
        assert after > last
        assert sum(sizes[first : last + 1]) > room
    assert (len(turns) == 1) == (sum(sizes) <= room)
    assert copies.has_turns == (len(turns) > 1)


def test_what_fits_is_copied_all_at_once() -> None:
    assert copies_of([torch.zeros(1_000) for _ in range(50)], 9).turn == (0, 50)


def test_which_parameters_can_be_copied() -> None:
    can: list[Any] = [torch.zeros(2), torch.zeros(2, dtype=torch.complex64), torch.zeros(0)]
    cannot: list[Any] = [
        None,
        torch.zeros(2, device="meta"),
        torch.zeros(2, 2).to_sparse(),
        torch.zeros(2, dtype=torch.int64),
        torch.nn.parameter.UninitializedParameter(),
    ]
    assert all(map(can_be_copied, can))
    assert not any(map(can_be_copied, cannot))


def test_double_precision_only_for_doubles() -> None:
    for dtype, expected in {
        torch.float32: torch.float32,
        torch.bfloat16: torch.float32,
        torch.complex64: torch.float32,
        torch.float64: torch.float64,
        torch.complex128: torch.float64,
    }.items():
        assert working_dtype(torch.zeros(1, dtype=dtype)) is expected


def test_alike_tensors_of_another_shape_than_their_parameters_are_not_copied() -> None:
    parameters = [torch.zeros(3) for _ in range(6)]
    copies = FlatCopies(torch.device("cpu"), torch.float32, range(6), parameters, 2)
    copies.copy("m", [torch.full((3,), 7.0) for _ in range(6)])
    present = copies.copy("m", [torch.ones(2) for _ in range(6)])
    assert not present.any()
    assert copies.flat("m", 0, 18).tolist() == [7.0] * 18


def test_of_alike_tensors_those_that_there_are_are_copied() -> None:
    parameters = [torch.zeros(2, 2) for _ in range(6)]
    copies = FlatCopies(torch.device("cpu"), torch.float32, range(6), parameters, 2)
    tensors = [torch.full((2, 2), float(i)) if i != 3 else None for i in range(6)]
    tensors[5] = torch.tensor([[5.0, 6.0], [7.0, 8.0]]).T
    present = copies.copy("g", tensors)
    assert present.tolist() == [True, True, True, False, True, True]
    assert copies.flat("g", 16, 24).tolist() == [4.0, 4.0, 4.0, 4.0, 5.0, 7.0, 6.0, 8.0]
