"""What the program calls a thing, read off its source."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

from gradscope.session.source_names import argument_names, assigned_name, called_name


def arguments(*args: Any, **kwargs: Any) -> list[str] | None:
    return argument_names(sys._getframe(1), 0, "model")


def assigned(*args: Any) -> str | None:
    return assigned_name(sys._getframe(1))


def test_arguments_are_called_as_they_are_spelled() -> None:
    model = gen = disc = None
    self = SimpleNamespace(net=None)
    assert arguments(model) == ["model"]
    assert arguments(model=gen) == ["gen"]
    assert arguments(self.net) == ["net"]
    assert arguments([disc, gen]) == ["disc", "gen"]
    assert arguments(
        (gen, disc),
        "something else",
    ) == ["gen", "disc"]
    # A text that is no source cannot be read, and that is no error.
    assert eval("arguments(model)", {"arguments": arguments, "model": model}) is None


def test_a_called_model_is_known_by_its_variable() -> None:
    class Model:
        def __call__(self, x: int) -> str | None:
            return called_name(sys._getframe(1))

    netG = Model()  # noqa: N806
    self = SimpleNamespace(encoder=Model())
    assert netG(1) == "netG"
    assert self.encoder(2) == "encoder"


def test_a_model_is_known_by_its_variable_where_other_weights_stand_in() -> None:
    def functional_call(*args: Any) -> str | None:
        return called_name(sys._getframe(1))

    torch = SimpleNamespace(func=SimpleNamespace(functional_call=functional_call))
    net, given = object(), (object(), {})
    self = SimpleNamespace(net=net)
    assert functional_call(net, {}, (1,)) == "net"
    assert torch.func.functional_call(self.net, {}, 1) == "net"
    assert functional_call(*given) is None


def test_an_assignment_names_its_variable() -> None:
    opt_d = assigned(1)
    assert opt_d == "opt_d"
    self = SimpleNamespace()
    self.optimizer = assigned(
        1,
        2,
    )
    assert self.optimizer == "optimizer"
    assert [assigned(1)] == [None]
    a = 1; b = assigned(a)  # fmt: skip  # noqa: E702
    assert b == "b"


def test_assignments_to_several_variables_name_each() -> None:
    self = SimpleNamespace()
    opt_g, self.opt_d = assigned(1), assigned(2, [3, 4])
    assert (opt_g, self.opt_d) == ("opt_g", "opt_d")
    é = 1; [first, second] = [assigned(é), assigned(é)]  # fmt: skip  # noqa: E702
    assert (first, second) == ("first", "second")
    both = assigned(1), assigned(2)
    assert both == ("both", "both")
