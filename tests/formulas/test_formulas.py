"""Every update rule against the optimizer of torch that follows it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch.testing._internal.common_optimizers import optim_db

from gradscope.formulas import FORMULAS
from gradscope.formulas.formula import Formula
from gradscope.formulas.worksheet import Worksheet

CPU = torch.device("cpu")
INFOS = {info.optim_cls.__name__: info for info in optim_db if info.optim_cls.__name__ != "LBFGS"}
STEPS = 7  # the first at which RAdam, with its usual betas, is adaptive is the sixth

ANY_SHAPE: list[tuple[int, ...]] = [(), (0,), (7,), (4, 3), (2, 3, 4)]
SHAPES: dict[str, list[tuple[int, ...]]] = {
    "Muon": [(4, 3), (3, 5), (1, 1), (6, 6)],
    # torch divides by the number of elements.
    "Adafactor": [(), (1,), (7,), (4, 3), (2, 3, 4)],
}

# Beyond what torch's own tests try: switches together, and numbers that make a difference soon.
FURTHER: dict[str, tuple[str, dict[str, Any]]] = {
    "Adadelta, large eps": ("Adadelta", {"eps": 0.1, "weight_decay": 0.1, "maximize": True}),
    "Adafactor, large eps": ("Adafactor", {"eps": (0.3, 0.5), "lr": 1.0}),
    "Adagrad, everything": (
        "Adagrad",
        {"lr_decay": 0.5, "initial_accumulator_value": 0.2, "eps": 0.1, "maximize": True},
    ),
    "Adam, amsgrad, maximize": ("Adam", {"amsgrad": True, "maximize": True, "eps": 0.1}),
    "AdamW, amsgrad, no decay": ("AdamW", {"weight_decay": 0, "amsgrad": True}),
    "Adamax, large eps": ("Adamax", {"eps": 0.1, "weight_decay": 0.1, "betas": (0.5, 0.5)}),
    "ASGD, average": ("ASGD", {"t0": 2, "lambd": 0.1, "alpha": 0.5, "lr": 0.1}),
    "ASGD, no decay": ("ASGD", {"lambd": 0}),
    "Muon, plain": ("Muon", {"nesterov": False, "weight_decay": 0, "momentum": 0.3}),
    "Muon, rates of AdamW": ("Muon", {"adjust_lr_fn": "match_rms_adamw"}),
    "NAdam, decoupled, maximize": (
        "NAdam",
        {"weight_decay": 0.1, "decoupled_weight_decay": True, "maximize": True, "eps": 0.1},
    ),
    "RAdam, soon adaptive": ("RAdam", {"betas": (0.8, 0.99), "weight_decay": 0.1, "eps": 0.1}),
    "RAdam, never adaptive": ("RAdam", {"betas": (0.8, 0.6), "eps": 0.1}),
    "RMSprop, momentum": ("RMSprop", {"momentum": 0.9, "alpha": 0.5, "eps": 0.1}),
    "Rprop, bounds": ("Rprop", {"lr": 0.1, "step_sizes": (0.08, 0.11), "etas": (0.3, 1.4)}),
    "Rprop, out of bounds": ("Rprop", {"lr": 1.0, "step_sizes": (1e-6, 0.5)}),
    "SGD, dampening": ("SGD", {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1}),
    "SGD, everything": (
        "SGD",
        {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1, "maximize": True},
    ),
}


def cases(keep: Callable[[str], bool] = lambda name: True) -> list[Any]:
    """Each optimizer with each of the arguments that torch tests it with, and with ours.

    On the CPU torch's are without capturable. Differentiable is left out: such a step is the same
    arithmetic, but cannot update a leaf.
    """
    torchs = [
        pytest.param(name, one.kwargs, id=f"{name}-{one.desc}")
        for name, info in INFOS.items()
        for one in info.optim_inputs_func(device=CPU)
    ]
    ours = [pytest.param(name, kwargs, id=case) for case, (name, kwargs) in FURTHER.items()]
    return [p for p in torchs + ours if p.values[0] != "SparseAdam" and keep(p.values[0])]


@pytest.fixture
def _float64_by_default() -> Iterator[None]:
    """Without it, torch keeps its counters in float32."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def with_implementations(some: list[Any]) -> list[Any]:
    """Cases once for each implementation that torch has on the CPU."""
    found = []
    for case in some:
        info = INFOS[case.values[0]]
        for each in ("for-loop", "foreach", "fused"):
            on_cpu = each != "fused" or "cpu" in info.supports_fused_on
            if each == "for-loop" or (each in info.supported_impls and on_cpu):
                found.append(pytest.param(*case.values, each, id=f"{case.id}-{each}"))
    return found


in_float64 = pytest.mark.usefixtures("_float64_by_default")


@dataclass
class Update:
    """One update of one parameter: what went in and what came out."""

    formula: Formula
    group: dict[str, Any]
    is_first: bool
    weight_before: torch.Tensor
    weight_after: torch.Tensor
    gradient: torch.Tensor
    touched: torch.Tensor | None
    state_before: dict[str, torch.Tensor]
    state_after: dict[str, torch.Tensor]

    @property
    def made(self) -> Any:
        return (self.weight_after - self.weight_before).numpy()

    def given(self, array: Callable[[Any], Any], number: Callable[[Any], Any]) -> dict[str, Any]:
        """What the worksheet is given, arrays and single numbers of the kinds that are wanted."""
        given: dict[str, Any] = {}
        for name, value in self.group.items():
            if name == "betas":
                given["beta1"], given["beta2"] = map(number, value)
            elif isinstance(value, tuple):
                given[name] = tuple(map(number, value))
            else:
                given["mu" if name == "momentum" else name] = number(value)
        for key, name in self.formula.state.items():
            kind = number if name in self.formula.scalars else array
            value = self.state_before.get(key)
            given[f"{name}_before"] = 0.0 if value is None else kind(value)
        given["weight_before"], given["g"] = array(self.weight_before), array(self.gradient)
        given["touched"] = 1 if self.touched is None else array(self.touched)
        given["is_first"] = self.is_first
        given["dtype"] = str(self.weight_before.dtype).removeprefix("torch.")
        return given

    def worked_out(
        self,
        array: Callable[[Any], Any] = lambda tensor: tensor.numpy(),
        number: Callable[[Any], Any] = lambda value: as_python(value),
    ) -> dict[str, Any]:
        return work_out(self.formula, self.given(array, number))


def work_out(formula: Formula, given: dict[str, Any]) -> dict[str, Any]:
    sheet = Worksheet(**given)
    formula.apply(sheet)
    return sheet.written


def as_python(value: Any) -> Any:
    return value.item() if isinstance(value, torch.Tensor) else value


def real(tensor: torch.Tensor) -> torch.Tensor:
    """A copy; sparse made dense, and complex numbers pairs."""
    dense = tensor.detach().to_dense().clone()
    return torch.view_as_real(dense) if dense.is_complex() else dense


def state_of(optimizer: torch.optim.Optimizer, parameter: torch.Tensor) -> dict[str, torch.Tensor]:
    state = optimizer.state.get(parameter, {})
    return {key: real(torch.as_tensor(v)) for key, v in state.items() if v is not None}


def touched_by(gradient: torch.Tensor) -> torch.Tensor | None:
    if not gradient.is_sparse:
        return None
    touched = torch.zeros(gradient.shape)
    touched[tuple(gradient._indices())] = 1
    return touched


def parameters_of(
    name: str, dtype: torch.dtype, shapes: list[tuple[int, ...]] | None = None
) -> list[torch.Tensor]:
    torch.manual_seed(0)
    shapes = shapes or SHAPES.get(name, ANY_SHAPE)
    return [torch.nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in shapes]


def dense(parameter: torch.Tensor, step: int) -> torch.Tensor:
    """A gradient; of changing size, and some of it 0."""
    size = 10.0 ** (step % 3 - 1)
    return size * torch.randn_like(parameter) * (torch.rand(parameter.shape) < 0.9)


def updates(
    optimizer: torch.optim.Optimizer,
    gradient: Callable[[torch.Tensor, int], torch.Tensor] = dense,
    steps: int = STEPS,
) -> Iterator[Update]:
    """Let an optimizer make steps; gives every update of every parameter."""
    formula = FORMULAS[type(optimizer).__name__]
    (group,) = optimizer.param_groups
    for step in range(steps):
        before = []
        for parameter in group["params"]:
            parameter.grad = gradient(parameter, step)
            before.append((real(parameter), state_of(optimizer, parameter)))
        optimizer.step()
        for parameter, (weight, state) in zip(group["params"], before, strict=True):
            yield Update(
                formula=formula,
                group={name: value for name, value in group.items() if name != "params"},
                is_first=not any(key in state for key in formula.state),
                weight_before=weight,
                weight_after=real(parameter),
                gradient=real(parameter.grad),
                touched=touched_by(parameter.grad),
                state_before=state,
                state_after=state_of(optimizer, parameter),
            )


def optimizer_of(
    name: str,
    arguments: dict[str, Any],
    parameters: list[torch.Tensor],
    implementation: str = "for-loop",
) -> torch.optim.Optimizer:
    info = INFOS[name]
    chosen = {flag: flag == implementation for flag in ("foreach", "fused")}
    chosen = {flag: on for flag, on in chosen.items() if flag in info.supported_impls}
    dtype = torch.get_default_dtype()
    own = {k: v.to(dtype) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    return info.optim_cls(parameters, **own, **chosen)


def norm(x: Any) -> float:
    return float(np.linalg.norm(np.ravel(x)))


def assert_close(found: Any, expected: Any, relative: float, what: str, slack: float = 0) -> None:
    # In float64, as some quantities are truth values; one may be a number for the whole array.
    found, expected = np.broadcast_arrays(np.float64(found), np.float64(expected))
    error = norm(found - expected)
    assert error <= relative * norm(expected) + slack, f"{what}: off by {error} of {norm(expected)}"


def assert_explains(update: Update, relative: float = 1e-9) -> dict[str, Any]:
    """What the formula makes of an update is what happened, but for the rounding of the weight."""
    written = update.worked_out()
    rounding = torch.finfo(update.weight_before.dtype).eps * norm(update.weight_before)
    assert_close(written["update"], update.made, relative, "the update", rounding)
    return written


def assert_state_agrees(update: Update, written: dict[str, Any]) -> None:
    for key, name in update.formula.state.items():
        assert (key in update.state_after) == (name in written), f"{key} is not {name}"
        if name in written:
            assert_close(written[name], update.state_after[key], 1e-9, f"{name}, torch's {key}")


def test_every_optimizer_of_torch_but_lbfgs_has_a_formula() -> None:
    assert sorted(FORMULAS) == sorted(INFOS)
    assert all(name == formula.name for name, formula in FORMULAS.items())


@in_float64
@pytest.mark.parametrize(("name", "arguments", "implementation"), with_implementations(cases()))
def test_update_and_state(name: str, arguments: dict[str, Any], implementation: str) -> None:
    parameters = parameters_of(name, torch.float64)
    for update in updates(optimizer_of(name, arguments, parameters, implementation)):
        written = assert_explains(update)
        assert_state_agrees(update, written)
        assert list(written)[-1] == "update"


@pytest.mark.parametrize(("name", "arguments", "implementation"), with_implementations(cases()))
def test_update_in_float32(name: str, arguments: dict[str, Any], implementation: str) -> None:
    parameters = parameters_of(name, torch.float32)
    for update in updates(optimizer_of(name, arguments, parameters, implementation)):
        written = assert_explains(update, 1e-3)
        if update.weight_before.ndim:  # otherwise it is a number
            assert written["update"].dtype == np.float32, "float64 takes twice the memory"


@in_float64
@pytest.mark.parametrize("implementation", ["for-loop", "foreach"])
@pytest.mark.parametrize(("name", "arguments"), cases(lambda name: INFOS[name].supports_complex))
def test_complex_weights_are_pairs_of_real_ones(
    name: str, arguments: dict[str, Any], implementation: str
) -> None:
    parameters = parameters_of(name, torch.complex128)
    for update in updates(optimizer_of(name, arguments, parameters, implementation)):
        assert_state_agrees(update, assert_explains(update))


SPARSE = {
    "Adagrad": ("Adagrad", {"lr_decay": 0.1}),
    "Adagrad, accumulated": ("Adagrad", {"initial_accumulator_value": 0.3, "maximize": True}),
    "SGD": ("SGD", {}),
    "SGD, momentum": ("SGD", {"momentum": 0.9, "dampening": 0.2, "maximize": True}),
    "SGD, Nesterov": ("SGD", {"momentum": 0.9, "nesterov": True}),
} | {
    f"SparseAdam, {one.desc}": ("SparseAdam", one.kwargs)
    for one in INFOS["SparseAdam"].optim_inputs_func(device=CPU)
}


@in_float64
@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
@pytest.mark.parametrize(("name", "arguments"), SPARSE.values(), ids=SPARSE)
def test_sparse_gradients(name: str, arguments: dict[str, Any]) -> None:
    rows = [[0, 2], [2], [], [1, 1, 5], [0, 5, 3], [4, 2, 4]]

    def sparse(parameter: torch.Tensor, step: int) -> torch.Tensor:
        values = torch.randn(len(rows[step]), *parameter.shape[1:])
        return torch.sparse_coo_tensor([rows[step]], values, parameter.shape)

    parameters = parameters_of(name, torch.float64, [(6, 3), (6,)])
    optimizer = optimizer_of(name, arguments, parameters)
    for update in updates(optimizer, sparse, steps=len(rows)):
        assert_state_agrees(update, assert_explains(update))


@in_float64
@pytest.mark.parametrize(("name", "arguments"), cases())
def test_parts_are_due_to_what_they_are_called_after(name: str, arguments: dict[str, Any]) -> None:
    """They add up, and each is 0 where what it is due to is 0."""
    causes = {"decay": ["weight_before"], "momentum": ["m_before", "b_before"], "fresh": ["g"]}
    parameters = parameters_of(name, torch.float64, [(5, 4)])
    for update in updates(optimizer_of(name, arguments, parameters)):
        written = update.worked_out()
        parts = [written[part] for part in causes if part in written]
        has_decay = update.group.get("weight_decay") or update.group.get("lambd")
        assert ("decay" in written) == bool(has_decay and name != "Rprop")
        assert ("fresh" in written) == (name not in ("Muon", "Rprop"))
        if "fresh" in written:
            assert_close(sum(parts), written["update"], 1e-12, "the sum of the parts")
        for part, names in causes.items():
            given = update.given(lambda tensor: tensor.numpy().copy(), as_python)
            for cause in names:
                if np.ndim(given.get(cause)):
                    given[cause][0] = 0
            if part in written:
                assert not np.any(work_out(update.formula, given)[part][0]), part


def element(at: tuple[int, ...], kind: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda tensor: kind(tensor[at].item())


@in_float64
@pytest.mark.parametrize(("name", "arguments"), cases(lambda name: FORMULAS[name].elementwise))
@pytest.mark.parametrize("kind", [float, np.float64])
def test_single_weights_give_what_arrays_give(
    name: str, arguments: dict[str, Any], kind: Callable[[Any], Any]
) -> None:
    parameters = parameters_of(name, torch.float64, [(2, 2)])
    for update in updates(optimizer_of(name, arguments, parameters)):
        expected = update.worked_out()
        for at in np.ndindex(2, 2):
            found = update.worked_out(element(at, kind))
            assert list(found) == list(expected)
            for quantity, values in expected.items():
                value = np.broadcast_to(values, (2, 2))[at]
                assert found[quantity] == pytest.approx(value, rel=1e-12), quantity


def all_tensors(value: Any) -> Any:
    """A number as a tensor, as hyper-parameters and counters of capturable optimizers are."""
    return torch.tensor(value) if isinstance(value, float) else value


@in_float64
@pytest.mark.parametrize("number", [as_python, all_tensors], ids=["numbers", "all tensors"])
@pytest.mark.parametrize(("name", "arguments"), cases())
def test_tensors_give_what_arrays_give(
    name: str, arguments: dict[str, Any], number: Callable[[Any], Any]
) -> None:
    for update in updates(optimizer_of(name, arguments, parameters_of(name, torch.float64))):
        expected = update.worked_out()
        found = update.worked_out(lambda tensor: tensor, number)
        assert found["update"].shape == update.weight_before.shape
        for quantity, values in expected.items():
            assert_close(found[quantity], values, 1e-12, quantity)


@pytest.mark.parametrize(("name", "arguments"), cases())
def test_no_value_on_a_device_is_looked_at(name: str, arguments: dict[str, Any]) -> None:
    """Tensors without any values, as a tensor whose value is not there yet."""

    def meta(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to("meta")

    def meta_counter(value: Any) -> Any:
        return meta(value) if isinstance(value, torch.Tensor) else value

    for update in updates(optimizer_of(name, arguments, parameters_of(name, torch.float32))):
        given = update.given(meta, meta_counter)
        given["lr"] = torch.tensor(0.1, device="meta")
        written = work_out(update.formula, given)
        assert written["update"].shape == update.weight_before.shape


@pytest.mark.parametrize("shape", [(300, 130), (130, 300)])
@pytest.mark.parametrize("nesterov", [True, False])
def test_muon_rounds_as_torch_does(shape: tuple[int, int], nesterov: bool) -> None:
    """One element rounded otherwise to bfloat16 is amplified to 5e-3 of the update."""
    parameters = parameters_of("Muon", torch.float32, [shape])
    for update in updates(torch.optim.Muon(parameters, lr=0.1, nesterov=nesterov)):
        assert_explains(update, 1e-3)


@pytest.mark.parametrize("name", ["ASGD", "NAdam"])
def test_counters_in_float32_cost_digits(name: str) -> None:
    """torch keeps rates and products of these in float32 beside weights in float64."""
    parameters = parameters_of(name, torch.float64)
    for update in updates(INFOS[name].optim_cls(parameters)):
        assert_explains(update, 1e-6)


@in_float64
def test_state_that_was_loaded_is_continued() -> None:
    """A step counter says nothing about whether there is state: it may start anywhere."""
    parameters = parameters_of("SGD", torch.float64)
    optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9, dampening=0.5)
    for parameter in parameters[1:]:
        optimizer.state[parameter]["momentum_buffer"] = torch.randn_like(parameter).detach()
    for update in updates(optimizer):
        assert_state_agrees(update, assert_explains(update))
