"""Statistics of many tensors against float64 formulas."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from gradscope.instruments.statistics import StatisticsReader


def expected(t: torch.Tensor) -> dict[str, float]:
    wide = t.detach().to(torch.float64)
    return {
        "norm": float(torch.sqrt((wide**2).sum())),
        "mean": float(wide.mean()),
        "std": float(wide.std(correction=0)),
        "min": float(wide.min()),
        "max": float(wide.max()),
        "abs_max": float(wide.abs().max()),
        "zero_fraction": float((wide == 0).double().mean()),
        "n_nonfinite": 0.0,
    }


DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1, 7, 16_384, 16_385, 300_000])
def test_every_statistic_equals_its_formula(dtype: torch.dtype, size: int) -> None:
    torch.manual_seed(size)
    tensor = torch.randn(size).mul(3).add(0.5).to(dtype)
    tensor[:: max(1, size // 5)] = 0
    small = torch.randn(3, 4, dtype=dtype)
    reader = StatisticsReader([small, tensor])
    found = reader.statistics([small, tensor]).value()
    for i, each in enumerate((small, tensor)):
        for name, value in expected(each).items():
            assert getattr(found, name)[i] == pytest.approx(value, rel=2e-6, abs=2e-6), name
    sums = reader.sums_of_squares([small, tensor]).value()
    assert np.sqrt(sums) == pytest.approx(found.norm, rel=1e-6)


def test_the_sum_of_squares_of_millions_of_elements_is_not_off() -> None:
    torch.manual_seed(0)
    tensor = torch.randn(4_200_000)
    exact = float((tensor.double() ** 2).sum())
    found = StatisticsReader([tensor]).sums_of_squares([tensor]).value()[0]
    assert found == pytest.approx(exact, rel=1e-6)


@pytest.mark.parametrize("size", [10, 100_000])
@pytest.mark.parametrize("magnitude", [1e25, 1e-25, 1e-40])
def test_squares_beyond_float32_are_neither_infinite_nor_zero(size: int, magnitude: float) -> None:
    tensor = torch.full((size,), magnitude)
    found = StatisticsReader([tensor]).sums_of_squares([tensor]).value()[0]
    assert math.sqrt(found) == pytest.approx(float(tensor.double().norm()), rel=1e-5)


@pytest.mark.parametrize("size", [10, 100_000])
def test_nonfinite_elements_are_counted(size: int) -> None:
    tensor = torch.randn(size)
    tensor[0], tensor[3], tensor[7] = math.nan, math.inf, -math.inf
    found = StatisticsReader([tensor]).statistics([tensor]).value()
    assert found.n_nonfinite[0] == 3
    assert not np.isfinite(found.norm[0])


def test_absent_tensors_are_nan_and_do_not_disturb_the_others() -> None:
    tensors = [torch.randn(5), torch.randn(3, 2), torch.randn(20_000)]
    reader = StatisticsReader(tensors)
    reader.statistics(tensors).value()
    for missing in range(3):
        partly = [None if i == missing else t for i, t in enumerate(tensors)]
        found = reader.statistics(partly).value()
        assert np.isnan(found.norm[missing])
        for i in {0, 1, 2} - {missing}:
            assert found.norm[i] == pytest.approx(float(tensors[i].norm()), rel=1e-6)


def sparse_rows(rows: list[int], values: list[list[float]], *, n_rows: int) -> torch.Tensor:
    shape = (n_rows, len(values[0]))
    return torch.sparse_coo_tensor([rows], values, shape, check_invariants=True)


def test_tensors_of_every_other_kind_are_read_or_left_out() -> None:
    sparse = sparse_rows([1, 1, 2], [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], n_rows=4)
    kinds = {
        "transposed": torch.randn(4, 6).t(),
        "zero-dimensional": torch.tensor(3.0),
        "empty": torch.zeros(0),
        "complex": torch.randn(5, dtype=torch.complex64),
        "meta": torch.randn(3, device="meta"),
        "sparse, with a row stored twice": sparse,
        "expanded": torch.randn(1, 3).expand(4, 3),
    }
    norms = {
        "transposed": float(kinds["transposed"].norm()),
        "zero-dimensional": 3.0,
        "empty": 0.0,
        "complex": float(kinds["complex"].abs().norm()),
        "meta": math.nan,
        "sparse, with a row stored twice": float(sparse.to_dense().norm()),
        "expanded": float(kinds["expanded"].norm()),
    }
    tensors = list(kinds.values())
    reader = StatisticsReader(tensors)
    found = reader.statistics(tensors).value()
    sums = reader.sums_of_squares(tensors).value()
    for i, name in enumerate(kinds):
        assert found.norm[i] == pytest.approx(norms[name], rel=1e-6, nan_ok=True), name
        assert np.sqrt(sums[i]) == pytest.approx(norms[name], rel=1e-6, nan_ok=True), name


def test_a_dense_parameter_whose_gradient_turns_out_sparse_is_read() -> None:
    weight = torch.randn(6, 2)
    reader = StatisticsReader([weight, torch.randn(3)])
    gradient = sparse_rows([1, 4], [[1.0, 2.0], [3.0, 4.0]], n_rows=6)
    found = reader.sums_of_squares([gradient, torch.ones(3)]).value()
    assert found.tolist() == pytest.approx([30.0, 3.0])


def test_every_number_is_that_of_its_own_tensor_whatever_shapes_alternate() -> None:
    torch.manual_seed(0)
    shapes = [(3, 4), (5,), (20_000,), (3, 4), (), (5,), (2, 3, 3), (3, 4), (5,)]
    tensors = [torch.randn(shape) + i for i, shape in enumerate(shapes)]
    reader = StatisticsReader(tensors)
    wanted = [float(tensor.double().norm()) for tensor in tensors]
    assert np.sqrt(reader.sums_of_squares(tensors).value()) == pytest.approx(wanted, rel=1e-6)
    found = reader.statistics(tensors).value()
    assert found.norm == pytest.approx(wanted, rel=1e-6)
    assert found.max.tolist() == [float(tensor.max()) for tensor in tensors]
