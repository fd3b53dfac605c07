"""The sheet on which an update rule is worked out, line by line."""

from __future__ import annotations

from typing import Any


class Worksheet:
    """Named quantities of one optimizer step, in the order in which they were written.

    An update rule reads what is given and writes one attribute per line::

        sheet.m = sheet.beta1 * sheet.m_before + (1 - sheet.beta1) * sheet.g

    A quantity is whatever supports arithmetic: a float, an array of all elements, or a term that
    remembers how it was computed. Numbers are best given as Python's: NumPy's float64 makes float64
    of float32 arrays. What is given, in every rule (arrays have the shape of the weight, or are
    flat where the rule works element by element):

    =================  =======================================================================
    ``weight_before``  the weight before the step
    ``g``              its gradient as the optimizer reads it, unscaled, before the optimizer's
                       own ``maximize`` and weight decay
    ``<s>_before``     each quantity ``s`` of the optimizer's state before the step (0 where it has
                       none yet), as named in the rule's ``state``; ``t_before`` counts the steps
    hyper-parameters   under the names of the parameter group, tuples as tuples, but ``betas`` as
                       ``beta1`` and ``beta2``, and ``momentum`` as ``mu``; a None is given as None
    ``is_first``       a bool: whether the optimizer held no state for the parameter before, in
                       SGD no ``momentum_buffer``. A rule must not ask ``t_before`` for it, which
                       may be a number on a device
    ``touched``        for a sparse gradient 1 where it has an element and 0 elsewhere; else 1
    ``dtype``          a text, the dtype of the weight and its state: ``float32``, ``bfloat16`` …;
                       read by rules that are not elementwise
    =================  =======================================================================

    A rule whose state does not start at 0 asks ``is_first`` and its hyper-parameters.

    What a rule writes, where it applies, under these names: ``decay``, ``momentum`` and ``fresh``,
    the parts of the update due to weight decay, to the state before, and to the gradient. They add
    up to the update; a part that does not apply is not written, and a rule that is not linear in
    the gradient writes no more than ``decay``. ``denominator``; ``effective_lr``, by which the
    (averaged) gradient is multiplied, a number where it is the same for all elements;
    ``eps_dominates``, whether eps is the larger part of the denominator; each quantity of the state
    after the step under its bare name; and last ``update``, what is added to the weight.
    """

    def __init__(self, **given: Any) -> None:
        object.__setattr__(self, "given", dict(given))
        object.__setattr__(self, "written", {})

    given: dict[str, Any]
    written: dict[str, Any]

    def __getattr__(self, name: str) -> Any:
        # Only reached for what is no attribute of the object itself.
        for quantities in (self.written, self.given):
            if name in quantities:
                return quantities[name]
        raise AttributeError(f"this worksheet has no {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        self.written[name] = value

    def get(self, name: str, default: Any = None) -> Any:
        """Return a quantity, or ``default`` if it is neither given nor written."""
        return self.written.get(name, self.given.get(name, default))

    def __contains__(self, name: str) -> bool:
        return name in self.written or name in self.given
