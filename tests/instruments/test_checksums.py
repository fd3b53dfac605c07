from __future__ import annotations

import numpy as np
import pytest
import torch

from gradscope.instruments import checksums
from gradscope.instruments.checksums import Checksums


def checksum(tensor: torch.Tensor) -> int:
    (value,) = Checksums().read([tensor]).value().tolist()
    assert value >= 0
    return int(value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.complex64])
@pytest.mark.parametrize("shape", [(), (7,), (300, 401)])
def test_it_is_that_of_the_values_and_of_nothing_else(
    dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    tensor = torch.randn(shape, dtype=torch.float64).to(dtype)
    wanted = checksum(tensor)
    assert checksum(tensor.clone().requires_grad_()) == wanted
    elsewhere = torch.empty(*shape, 2, dtype=dtype)
    elsewhere[..., 1] = tensor
    assert checksum(elsewhere[..., 1]) == wanted
    changed = tensor.clone()
    last = changed.reshape(-1)[-1:]
    last += last.abs() * 2.0**-6
    assert checksum(changed) != wanted


def test_places_are_told_apart() -> None:
    tensor = torch.arange(200_000.0)
    swapped = tensor.clone()
    swapped[[5, 150_000]] = tensor[[150_000, 5]]
    shifted = tensor.roll(1 << 16)
    assert len({checksum(each) for each in (tensor, swapped, shifted)}) == 3


def test_the_last_bit_counts() -> None:
    tensor = torch.randn(100_000)
    changed = tensor.clone()
    changed[77_777] = torch.nextafter(changed[77_777], torch.tensor(9.0))
    assert checksum(changed) != checksum(tensor)


def test_zeros_are_nothing_whatever_their_sign() -> None:
    assert checksum(torch.zeros(5)) == checksum(-torch.zeros(5)) == checksum(torch.zeros(0)) == 0


def test_what_has_none() -> None:
    sparse = torch.eye(3).to_sparse()
    meta = torch.zeros(3, device="meta")
    found = Checksums().read([None, torch.ones(2), sparse, meta]).value()
    assert (found < 0).tolist() == [True, False, True, True]


def test_it_is_the_sum_in_whole_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Worked out in Python's numbers, however many blocks are taken at once."""
    monkeypatch.setattr(checksums, "_BLOCK", 4)
    torch.manual_seed(1)
    tensor = torch.randn(10)
    reader = Checksums()
    (found,) = reader.read([tensor]).value().tolist()
    factors = [int(factor) for factor in reader._factors[tensor.device]]
    bits = tensor.numpy().view(np.int32).tolist()
    total = sum(bit * factors[place % 4] * (2 * (place // 4) + 1) for place, bit in enumerate(bits))
    assert found == total % 2**64 % 2**63
