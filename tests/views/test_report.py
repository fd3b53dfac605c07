"""The page of a run: what it says, and that nothing of the program's gets out of its place."""

from __future__ import annotations

import itertools
import json
import math
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gradscope
from gradscope.errors import OutputExistsError, UsageError
from gradscope.rules import RULES, Finding, Findings, Severity
from gradscope.rules.selection import NOT_SELECTED
from gradscope.run.recording import OptimizerEntry, ParameterEntry, Recording
from gradscope.scope import Scope
from gradscope.views.report import report_page
from gradscope.views.report.flow_chart import _labels
from gradscope.views.report.forward_order import forward_order
from gradscope.views.report.gradient_flow import SCALES, gradient_flow
from gradscope.views.report.names import shown
from gradscope.views.report.packing import packed, unpacked
from gradscope.views.report.thinning import bins_of, spread, thinned_rows

HOSTILE = (
    "</script><script>window.hacked=1</script>",
    "<img src=x onerror=window.hacked=1>",
    "'\"><b>bold</b>",
    "../../etc/passwd",
    "nul\0in the middle",
    "\N{GRINNING FACE} \N{PILE OF POO}",
    "{{7*7}} {% raise %}",
    r"$$\sqrt{x}$$ \(x\) \[y\]",
    "$$x$$",
    "@name @{norm} $index &amp; &lt;",
    "\ud800 \u2028 \u202e right to left",
    "<!--<script>",
    "]]>",
    "x" * 10_000,
)


class Page(HTMLParser):
    """What a browser would make of a page, as far as the tests need it."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.texts: dict[str, str] = {}
        self.scripts: list[str] = []
        self.data: dict[str, Any] = {}
        self._section = ""
        self._script: dict[str, str | None] | None = None
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.texts[self._section] = self.texts.get(self._section, "") + " "
        self.attributes += attrs
        if tag == "section":
            self._section = dict(attrs)["id"] or ""
        if tag == "script":
            self._script = dict(attrs)

    def handle_endtag(self, tag: str) -> None:
        if tag == "script":
            self._script = None

    def handle_data(self, data: str) -> None:
        if self._script is not None:
            if self._script.get("id") == "data":
                self.data = json.loads(data)
            else:
                self.scripts.append(data)
        else:
            self.texts[self._section] = self.texts.get(self._section, "") + data

    def text(self, section: str) -> str:
        return " ".join(self.texts[section].split())


def page_of(scope: Scope) -> Page:
    scope._settle()
    return Page(report_page(scope._recording, scope.findings))


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))


def trained(n: int = 6, *, zero_grad: bool = True, **options: Any) -> Scope:
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with gradscope.watch(model, optimizer, **options) as scope:
        for _ in range(n):
            loss = F.mse_loss(model(torch.randn(16, 4)), torch.randn(16, 2))
            if zero_grad:
                optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return scope


# -- what it says ---------------------------------------------------------------------------


def test_a_healthy_run_is_told_to_be_one() -> None:
    page = page_of(trained())
    head = page.text("")
    assert "✓ no defect found" in head
    assert "none found anything wrong" in head
    assert page.text("findings").startswith("Findings None.")
    assert "order at all 6 steps: forward, zero_grad, backward, step" in page.text("loop")
    classes = [value for name, value in page.attributes if name == "class"]
    assert classes.count("missing") == 1  # what a browser without scripts is told


def test_a_defect_comes_first_with_place_evidence_and_fix() -> None:
    scope = trained(12, zero_grad=False)
    (finding,) = [each for each in scope.findings if each.code == "GS201"]
    page = page_of(scope)
    assert "✗ missing-zero-grad" in page.text("")
    told = page.text("findings")
    assert finding.message in told
    assert finding.fix in told
    assert f"test_report.py:{finding.line}" in told
    assert "compounded steps 11" in told
    assert "← GS201" in page.text("loop")
    assert "Dashed lines mark where findings begin" in page.text("steps")
    assert "compounded: an earlier step" in page.text("flow")


def test_symptoms_and_notes_are_folded_away() -> None:
    findings = Findings(
        [
            Finding("GS201", "missing-zero-grad", Severity.ERROR, "m", "f", symptoms=("GS604: s",)),
            Finding("GS604", "a-note", Severity.INFO, "only a note", "nothing"),
        ]
    )
    page = Page(report_page(trained()._recording, findings))
    told = page.text("findings")
    assert "1 error, 1 note" in told
    assert "Explains 1 other finding GS604: s" in told
    assert "1 note, only worth knowing" in told
    assert "✗ missing-zero-grad m" in page.text("")


def test_thirty_findings_are_all_told() -> None:
    findings = Findings(
        [
            Finding(
                f"MY{n:03}",
                f"rule-{n}",
                Severity.WARNING,
                f"message {n}",
                f"fix {n}",
                step_first=n,
                step_last=n + 1,
                evidence={"a": [1.5, 2], "b": {"x": True}, **{f"k{i}": i for i in range(9)}},
            )
            for n in range(30)
        ]
    )
    told = Page(report_page(trained(40)._recording, findings)).text("findings")
    assert all(f"message {n}" in told for n in range(30))
    assert "a 1.5, 2 b x: yes" in told
    assert "5 more facts" in told


def test_what_was_checked_and_what_it_cost_stand_at_the_end() -> None:
    scope = trained()
    scope._settle()
    run = scope._recording
    run.notes.append("a note <b>")
    unchecked = {"GS101": NOT_SELECTED, "GS105": "KeyError: 'x'"}
    page = Page(report_page(run, Findings([], unchecked)))
    told = page.text("checks")
    assert f"{len(RULES) - 2} rules were applied" in told
    assert "Not checked: GS105, which failed (KeyError: 'x')" in told
    assert "Not observed: a note <b>" in told
    assert "Rules that were not selected GS101" in told
    assert "watching took" in told
    assert "torch" not in told  # the recording does not know; the scope tells


def test_the_parameters_stand_in_a_table() -> None:
    page = page_of(trained())
    told = page.text("parameters")
    assert "0.weight Linear 8 × 4 32 optimizer fresh" in told
    assert page.tags.count("tr") > 4


# -- runs of which little is known ----------------------------------------------------------


def test_a_scope_that_saw_nothing_says_so() -> None:
    model = mlp()
    scope = gradscope.watch(model, torch.optim.SGD(model.parameters(), lr=0.1))
    page = page_of(scope)
    assert "no step of a watched optimizer was seen" in page.text("")
    assert "gradscope.watch(model, optimizer)" in page.text("steps")
    assert "No graph was captured" in page.text("graph")
    assert page.data["document"] is None
    assert "Nothing can be said" in page.text("findings")


def test_a_failed_part_is_no_loop_that_was_not_seen() -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with gradscope.watch(model, optimizer) as scope:
        for _ in range(12):
            optimizer.zero_grad()
            x = torch.randn(16, next(model.parameters()).shape[1])
            model(x).square().mean().backward()
            optimizer.step()
    row = {"step": 3, "event": "instrument_failed", "detail": "symmetry: ValueError"}
    scope._recording.rows("events").append({**row, "subject": "", "file": ""})
    said = page_of(scope).text("findings")
    assert "a part of gradscope failed" in said
    assert "Nothing can be said" not in said


def test_an_empty_recording_gives_a_page() -> None:
    page = Page(report_page(Recording()))
    assert "No parameter was watched" in page.text("parameters")


def test_a_switched_off_scope_gives_a_page() -> None:
    assert "nothing watched" in page_of(Scope(None)).text("")


def test_one_step_is_enough_for_every_part() -> None:
    page = page_of(trained(1))
    assert page.data["flow"]["edges"] == [0, 1]
    assert page.data["anatomy"]["steps"] == [0]
    assert page.data["ratios"]["steps"] == [0]


def test_backward_without_a_step() -> None:
    model = mlp()
    with gradscope.watch(model, torch.optim.SGD(model.parameters(), lr=0.1)) as scope:
        for _ in range(3):
            model(torch.randn(2, 4)).sum().backward()
    page = page_of(scope)
    assert page.data["ratios"] is None
    assert "No update of a weight was recorded" in page.text("ratios")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_losses_that_are_never_finite(value: float) -> None:
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters())
    with gradscope.watch(model, optimizer) as scope:
        for _ in range(4):
            optimizer.zero_grad()
            (model(torch.randn(2, 4)).sum() * value).backward()
            optimizer.step()
    page = page_of(scope)
    assert "No loss to draw" in page.text("steps")
    assert "NaN or infinite elements" in page.text("flow")


def test_some_losses_that_are_not_finite_are_marked() -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    with gradscope.watch(model, optimizer) as scope:
        for n in range(6):
            optimizer.zero_grad()
            loss = model(torch.randn(2, 4)).square().sum()
            (loss + (math.inf if n == 3 else 0)).backward()
            optimizer.step()
    assert "at 1 of 6 steps, the first of them 3" in page_of(scope).text("steps")


def test_several_models_and_optimizers() -> None:
    first, second = mlp(), mlp()
    a = torch.optim.AdamW(first.parameters(), lr=1e-2)
    b = torch.optim.SGD(second.parameters(), lr=1e-1, momentum=0.9)
    with gradscope.watch([first, second], [a, b]) as scope:
        for n in range(8):
            model, optimizer = ((first, a), (second, b))[n % 2]
            optimizer.zero_grad()
            F.mse_loss(model(torch.randn(4, 4)), torch.randn(4, 2)).backward()
            optimizer.step()
    page = page_of(scope)
    labels = [line["label"] for chart in page.data["charts"] for line in chart["lines"]]
    assert {"loss of a", "loss of b", "gradient norm of a", "group 0 of b"} <= set(labels)
    keys = {param["name"]: param["keys"] for param in page.data["anatomy"]["params"]}
    assert keys["first.0.weight"] == ["exp_avg", "exp_avg_sq"]
    assert keys["second.0.weight"] == ["momentum_buffer"]
    norms = unpacked(page.data["flow"]["norm"]).reshape(8, 8)
    assert np.isnan(norms[:4, 1::2]).all()
    assert np.isfinite(norms[:4, ::2]).all()


class Lion(torch.optim.Optimizer):
    """An optimizer that gradscope knows no formula of."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 1e-3})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p -= group["lr"] * p.grad.sign()


def test_an_optimizer_without_a_formula_is_measured_and_not_taken_apart() -> None:
    model = mlp()
    optimizer = Lion(model.parameters())
    with gradscope.watch(model, optimizer) as scope:
        for _ in range(4):
            optimizer.zero_grad()
            F.mse_loss(model(torch.randn(4, 4)), torch.randn(4, 2)).backward()
            optimizer.step()
    page = page_of(scope)
    assert "gradscope has no formula of this optimizer" in page.text("anatomy")
    assert "update_norm" in page.data["anatomy"]["values"]
    assert "residual" not in page.data["anatomy"]["values"]


def test_clipping_draws_both_norms_and_groups_their_own_rates() -> None:
    model = mlp()
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": 3e-3}]
    optimizer = torch.optim.AdamW(groups, lr=1e-2)
    with gradscope.watch(model, optimizer) as scope:
        for _ in range(4):
            optimizer.zero_grad()
            F.mse_loss(model(torch.randn(4, 4)), torch.randn(4, 2)).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
    charts = {chart["key"]: chart for chart in page_of(scope).data["charts"]}
    assert [line["label"] for line in charts["norm"]["lines"]] == [
        "gradient norm, before clipping",
        "gradient norm, after clipping",
    ]
    assert [line["label"] for line in charts["lr"]["lines"]] == ["group 0", "group 1"]


# -- numbers --------------------------------------------------------------------------------


def test_the_flow_holds_what_the_table_says() -> None:
    scope = trained(7, zero_grad=False)
    flow = gradient_flow(scope._recording)
    assert flow is not None
    grads = scope.grads
    names = (*SCALES, "zeroed", "none", "nonfinite")
    for row, name in enumerate(flow.rows):
        own = grads.loc[grads["param"] == name]
        assert flow.norm[row] == pytest.approx(own["norm"].to_numpy())
        assert [names[code] for code in flow.status[row]] == own["status"].tolist()


def test_many_steps_share_columns_and_many_parameters_rows() -> None:
    run = Recording()
    n_params, n_steps = 1000, 2000
    for number in range(n_params):
        block, name = divmod(number, 4)
        path = f"h.{block}.mlp"
        run.parameters.append(ParameterEntry(f"{path}.p{name}", module=path, shape=(2,)))
    run.optimizers.append(OptimizerEntry("o", "O"))
    run.rows("steps").extend(n_steps, {"step": np.arange(n_steps), "optimizer": 0})
    norm = np.ones((n_steps, n_params))
    norm[1234, 17] = 100.0
    status = np.zeros((n_steps, n_params), dtype=object)
    status[:] = "fresh"
    status[55, 999] = "stale"
    run.rows("grads").extend(
        n_steps * n_params,
        {
            "step": np.repeat(np.arange(n_steps), n_params),
            "param": np.tile(np.arange(n_params), n_steps),
            "optimizer": 0,
            "status": status.ravel().tolist(),
            "norm": norm.ravel(),
        },
    )
    flow = gradient_flow(run)
    assert flow is not None
    assert len(flow.rows) <= 160
    assert flow.norm.shape == (len(flow.rows), len(flow.columns) - 1)
    assert flow.norm.shape[1] <= 480
    assert flow.bundled == 1000
    # All parameters in one row here: the norm of them together.
    assert np.nanmax(flow.norm) == pytest.approx(math.sqrt(999 + 100**2))
    column = int(np.searchsorted(flow.columns, 55, side="right")) - 1
    assert SCALES[flow.status[-1, column]] == "stale"
    page = Page(report_page(run, Findings([])))
    assert "1,000 parameters are too many for rows of their own" in page.text("flow")
    assert "Each column stands for 5 steps" in page.text("flow")
    assert "No graph was captured, so the rows" in page.text("flow")


def test_names_beside_thin_rows_have_room() -> None:
    rows = ["wte.weight", *(f"h.{i // 10}.{i % 10}.weight" for i in range(100)), "norm.weight"]
    labels = _labels(rows, 7)
    assert [each["text"] for each in labels][:3] == ["wte.weight", "h.0", "h.1"]
    assert {each["rows"] for each in labels[1:11]} == {10}
    middles = [each["row"] + each["rows"] / 2 for each in labels]
    assert all(b - a >= 2 for a, b in itertools.pairwise(middles))
    # Where their beginnings tell nothing apart, as many as have room are named.
    assert len(_labels([f"h.{i}.mlp (12)" for i in range(84)], 7)) == 42


def test_forward_order_is_that_of_use_and_not_of_registration() -> None:
    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last = nn.Linear(3, 1)
            self.first = nn.Linear(2, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.last(self.first(x).relu())
            return y

    model = Backwards()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with gradscope.watch(model, optimizer) as scope:
        optimizer.zero_grad()
        model(torch.randn(4, 2)).sum().backward()
        optimizer.step()
    order, told = forward_order(scope._recording)
    names = [scope._recording.parameters[number].name for number in order]
    assert told
    assert [name.split(".")[0] for name in names] == ["first", "first", "last", "last"]


def test_packed_numbers_come_back() -> None:
    values = np.array([0.0, 1e-30, 3.25, 7e12, np.inf, np.nan])
    back = unpacked(packed(values))
    assert back[[0, 4]].tolist() == [0.0, np.inf]
    assert math.isnan(back[5])
    assert back[1:4] == pytest.approx(values[1:4], rel=2e-3)
    near = np.geomspace(1e-3, 1.0, 1000)
    assert unpacked(packed(near)) == pytest.approx(near, rel=1e-4)
    signed = np.array([-1.0, -0.25, 0.0, 0.5, 1.0])
    assert unpacked(packed(signed)) == pytest.approx(signed, abs=2e-5)
    assert np.isnan(unpacked(packed(np.full(3, np.nan)))).all()
    assert unpacked(packed(np.full(2, 5.0))) == pytest.approx([5.0, 5.0])


def test_thinning_keeps_ends_and_peaks() -> None:
    values = np.sin(np.arange(10_000) / 700)
    values[1234], values[4321], values[8000] = 50, -50, np.nan
    rows = thinned_rows([values], 400)
    assert len(rows) <= 420
    assert {0, 1234, 4321, 8000, 9999} <= set(rows.tolist())
    assert thinned_rows([values[:50]], 400).tolist() == list(range(50))
    assert bins_of(10, 4).tolist() == [0, 3, 6, 9, 10]
    assert bins_of(3, 4).tolist() == [0, 1, 2, 3]
    assert spread(np.arange(1000), 5).tolist() == [0, 1, 2, 3, 999]


# -- names ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_names_stay_texts(name: str) -> None:
    scope = trained(3)
    run = scope._recording
    in_tables = name.replace("\ud800", "")  # pandas keeps no lone surrogate
    for entry in run.parameters:
        entry.name = f"{in_tables}{entry.name}"
        entry.module = entry.module_type = in_tables
    run.optimizers[0].name = run.optimizers[0].kind = run.models[0].name = in_tables
    run.notes.append(name)
    finding = Finding(
        name, name, Severity.ERROR, name, name,
        params=(name,), step_first=1, file=name, line=3, evidence={name: name}, symptoms=(name,),
    )  # fmt: skip
    written = report_page(run, Findings([finding], {name: name}))
    page = Page(written)
    healthy = page_of(trained(3))
    assert page.scripts == healthy.scripts
    assert not {"img", "link", "object", "embed"} & set(page.tags)
    assert page.tags.count("b") == healthy.tags.count("b")
    assert page.tags.count("iframe") == 1
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert "\0" not in written
    assert len(written) < len(healthy.scripts[0]) + 400_000
    # Bokeh must not get to see any of it: it takes $$…$$ for mathematics.
    drawn = json.dumps(page.data["document"], ensure_ascii=False)
    assert name[:20] not in drawn
    if len(name) < 100:
        assert shown(name) in page.texts["findings"]
    written.encode("utf-8", "replace")


def test_texts_inside_of_charts_cannot_be_taken_for_mathematics() -> None:
    finding = Finding("$$x$$", "n", Severity.ERROR, "m", "f", step_first=1)
    page = Page(report_page(trained(3)._recording, Findings([finding])))
    assert "$$" not in json.dumps(page.data["document"])
    assert '"x"' in json.dumps(page.data["document"])


def test_names_are_shortened_in_the_middle() -> None:
    assert shown("abc") == "abc"
    assert shown("a" * 60 + "b" * 61, 120) == "a" * 60 + "…" + "b" * 59
    assert shown("a\0b\ud800") == "a\N{REPLACEMENT CHARACTER}b\N{REPLACEMENT CHARACTER}"


# -- the file -------------------------------------------------------------------------------


def test_nothing_in_the_page_is_loaded_from_elsewhere() -> None:
    page = page_of(trained())
    policy = next(value for name, value in page.attributes if name == "content" and value)
    assert "default-src 'none'" in policy
    assert "unsafe-eval" not in policy
    assert "http" not in policy
    loaded = [value for name, value in page.attributes if name in ("src", "href", "srcset")]
    assert all(value and value.startswith("#") for value in loaded)
    assert "link" not in page.tags


def test_the_scope_writes_it_once_and_again_if_forced(tmp_path: Path) -> None:
    scope = trained(2)
    path = scope.report(tmp_path / "run.html")
    assert path == tmp_path / "run.html"
    written = path.read_text("utf-8")
    assert f"<dd>{torch.__version__}</dd>" in written
    mode = path.stat().st_mode & 0o777
    (tmp_path / "other").touch()
    assert mode == (tmp_path / "other").stat().st_mode & 0o777
    (tmp_path / "other").unlink()
    path.write_text("mine")
    with pytest.raises(OutputExistsError, match=r"run\.html exists already.*force=True"):
        scope.report(str(path))
    assert path.read_text() == "mine"
    scope.report(str(path), force=True)
    assert path.read_text("utf-8").startswith("<!DOCTYPE html>")
    assert list(tmp_path.iterdir()) == [path]


def test_a_place_where_nothing_can_be_written_is_named(tmp_path: Path) -> None:
    scope = trained(1)
    with pytest.raises(UsageError, match="is a folder; name a file in it"):
        scope.report(tmp_path)
    with pytest.raises(UsageError, match="nowhere does not exist"):
        scope.report(tmp_path / "nowhere" / "run.html")
