"""How quantities and numbers are written: as text for a terminal, and as LaTeX.

Names follow torch's documentation and the papers: what belongs to this step has the subscript t,
what was there before it t-1. A name that is in no table is written as it is spelled in the rule.
"""

from __future__ import annotations

import math
import re
import unicodedata
from dataclasses import dataclass

from gradscope.formulas.formula import Formula

# Text and LaTeX of what does not follow from the name.
_SYMBOLS = {
    "weight_before": ("θₜ₋₁", r"\theta_{t-1}"),
    "weight_formula": ("θₜ", r"\theta_t"),
    "update": ("update", r"\Delta\theta_t"),
    "decay": ("decay", r"\Delta_{\mathrm{decay}}"),
    "momentum": ("momentum", r"\Delta_{\mathrm{momentum}}"),
    "fresh": ("fresh", r"\Delta_{\mathrm{fresh}}"),
    "lr": ("lr", r"\gamma"),
    "effective_lr": ("effective_lr", r"\gamma_{\mathrm{eff}}"),
    "weight_decay": ("λ", r"\lambda"),
    "eps": ("ε", r"\epsilon"),
    "t": ("t", "t"),
    "t_before": ("t_before", r"t_{\mathrm{before}}"),
    "dampening": ("τ", r"\tau"),
    "g_total": ("g_total", r"g_t^{\mathrm{total}}"),
    "g_negated": ("g_negated", r"g_t^{\mathrm{negated}}"),
    "v_max": ("v_maxₜ", r"v_t^{\max}"),
    "v_max_before": ("v_maxₜ₋₁", r"v_{t-1}^{\max}"),
    "bias_correction1": ("bias_correction1", r"\mathrm{bias}_1"),
    "bias_correction2": ("bias_correction2", r"\mathrm{bias}_2"),
}

# Names that are written as a Greek letter. Python's lambd stays: lambda is the weight decay's.
_GREEK = {"alpha", "beta", "gamma", "delta", "eta", "mu", "nu", "rho", "sigma", "tau", "phi"}

_DIGITS_DOWN = str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉")


@dataclass(frozen=True, slots=True)
class Symbol:
    """How one quantity is written.

    Attributes:
        text: for a monospaced font.
        latex: in math mode.
    """

    text: str
    latex: str


def number(value: float, digits: int = 6) -> str:
    """Write a number: as short as it is, or to so many significant digits."""
    if math.isfinite(value) and value == int(value) and abs(value) < 1e9:
        return f"{value:.0f}".replace("-", "−") if value else "0"
    short = repr(float(value))
    significant = re.sub(r"e.*|\D", "", short).lstrip("0")
    spelled = short if len(significant) <= digits else f"{value:.{digits}g}"
    return spelled.replace("-", "−", 1) if value < 0 else spelled


def latex_number(value: float, digits: int = 6) -> str:
    """Write a number in math mode, powers of ten as such."""
    spelled = number(value, digits).replace("−", "-", 1)
    mantissa, _, exponent = spelled.partition("e")
    if exponent:
        return rf"{mantissa} \times 10^{{{int(exponent)}}}"
    return {"inf": r"\infty", "-inf": r"-\infty", "nan": r"\mathrm{NaN}"}.get(spelled, spelled)


class Notation:
    """The names of the quantities of one rule.

    Args:
        formula: the rule; its state tells which names belong to steps, its symbols are preferred.
    """

    def __init__(self, formula: Formula | None = None) -> None:
        self._given_latex = dict(formula.symbols) if formula else {}
        self._of_steps = {"g", *(formula.state.values() if formula else ())}

    def symbol(self, name: str) -> Symbol:
        """Return how a quantity is written."""
        text, latex = _SYMBOLS.get(name) or self._spelled(name)
        return Symbol(text, self._given_latex.get(name) or self._stepped_back(name) or latex)

    def _stepped_back(self, name: str) -> str | None:
        """The rule's own LaTeX for what was there before the step, from that for afterwards."""
        after = self._given_latex.get(name.removesuffix("_before"))
        if after is None or not name.endswith("_before"):
            return None
        return re.sub(r"_t\b|_\{t\}", "_{t-1}", after) if "_t" in after else f"{after}_{{t-1}}"

    def _spelled(self, name: str) -> tuple[str, str]:
        place = re.fullmatch(r"(.+)\[(\d+)\]", name)
        if place:
            whole = self.symbol(place[1])
            return f"{whole.text}[{place[2]}]", rf"{{{whole.latex}}}_{{[{place[2]}]}}"
        base = name.removesuffix("_before")
        stem = base.rstrip("0123456789")
        digits = base[len(stem) :]
        latex_below = [digits] if digits else []
        text_below = ""
        if base != name:
            latex_below.append("t-1")
            text_below = "ₜ₋₁"
        elif base in self._of_steps:
            latex_below.append("t")
            text_below = "ₜ"
        if stem in _GREEK:
            letter = unicodedata.lookup(f"greek small letter {stem}")
            text, latex = letter + digits.translate(_DIGITS_DOWN), f"\\{stem}"
        else:
            upright = r"\mathrm{" + stem.replace("_", r"\_") + "}"
            text, latex = base, stem if len(stem) == 1 else upright
        below = ",".join(latex_below)
        if below:
            latex += f"_{below}" if len(below) == 1 else f"_{{{below}}}"
        return text + text_below, latex
