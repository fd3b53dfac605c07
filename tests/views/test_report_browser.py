"""The page of a run in a real browser, used as a person would."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from chromium import PROGRAM, Chromium
from test_report import HOSTILE, trained

import gradscope
from gradscope.rules import Finding, Findings, Severity
from gradscope.scope import Scope
from gradscope.views.report import report_page, write_report

pytestmark = pytest.mark.skipif(PROGRAM is None, reason="there is no Chromium on the PATH")

LIGHT, DARK = "rgb(255, 255, 255)", "rgb(18, 24, 31)"
PAPER = "getComputedStyle(document.body).backgroundColor"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    chromium = Chromium(tmp_path_factory.mktemp("profile"))
    yield chromium
    chromium.close()


@pytest.fixture(scope="module")
def healthy() -> Scope:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with gradscope.watch(model, optimizer, every=1) as scope:
        for _ in range(20):
            optimizer.zero_grad()
            F.mse_loss(model(torch.randn(16, 4)), torch.randn(16, 2)).backward()
            optimizer.step()
    return scope


class Report:
    """A page that is open in a browser."""

    def __init__(self, browser: Chromium, path: Path) -> None:
        self.browser = browser
        self.path = path
        browser.open(path)
        self.wait_for("document.documentElement.dataset.drawn === 'yes'")

    def run(self, script: str) -> Any:
        return self.browser.run(script)

    def wait_for(self, script: str) -> None:
        ends = time.monotonic() + 30
        while not self.run(script):
            assert time.monotonic() < ends, script
            time.sleep(0.02)

    def plot(self, key: str) -> tuple[float, float, float, float]:
        """Scroll to a chart and return where it is: left, top, width, height."""
        plot = f"document.querySelector('[data-chart=\"{key}\"] .plot')"
        self.run(f"{plot}.scrollIntoView({{block: 'center', behavior: 'instant'}})")
        x, y, w, h = self.run(
            f"(r => [r.x, r.y, r.width, r.height])({plot}.getBoundingClientRect())"
        )
        return x, y, w, h

    def point(self, key: str, across: float, down: float = 0.5) -> None:
        """Move the pointer over a chart: shares of its width and height."""
        x, y, width, height = self.plot(key)
        at = {"x": x + across * width, "y": y + down * height}
        for nudge in (0.0, 1.0):
            self.browser.call(
                "Input.dispatchMouseEvent", type="mouseMoved", x=at["x"] + nudge, y=at["y"]
            )
        self.settle()

    def settle(self) -> None:
        """Wait until what was changed has been drawn."""
        frame = "new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))"
        self.run(f"{frame}.then(() => 0)")

    def readout(self, key: str) -> str:
        shown = f"document.querySelector('[data-chart=\"{key}\"] .readout').innerText"
        return " ".join(self.run(shown).split())

    def n_colours(self, key: str) -> int:
        """How many colours a chart has: many where lines were drawn, few where nothing was."""
        return int(
            self.run(f"""(() => {{
            const found = new Set();
            const walk = node => {{
                if (node.tagName === "CANVAS" && node.width) {{
                    const pixels = node.getContext("2d")
                        .getImageData(0, 0, node.width, node.height).data;
                    for (let i = 0; i < pixels.length; i += 4)
                        if (pixels[i + 3])
                            found.add(pixels[i] << 16 | pixels[i + 1] << 8 | pixels[i + 2]);
                }}
                for (const child of node.shadowRoot?.children ?? []) walk(child);
                for (const child of node.children) walk(child);
            }};
            walk(document.querySelector('[data-chart="{key}"] .plot'));
            return found.size;
        }})()""")
        )


Open = Callable[..., Report]


@pytest.fixture
def report(browser: Chromium, tmp_path: Path) -> Iterator[Open]:
    """Opens pages; afterwards nothing may have been asked of anyone, or gone wrong."""
    opened: list[Report] = []
    browser.requests.clear()
    browser.complaints.clear()
    browser.window(1280, 860)
    browser.prefers("light")

    def open_page(scope: Scope, findings: Findings | None = None) -> Report:
        scope._settle()
        page = report_page(scope._recording, scope.findings if findings is None else findings)
        path = write_report(page, tmp_path / "run.html", force=True)
        opened.append(Report(browser, path))
        return opened[-1]

    yield open_page
    assert browser.complaints == []
    # The graph is a document of its own inside of the page, and comes out of the page.
    asked = [url for url in browser.requests if not url.startswith(("data:", "blob:"))]
    assert [url for url in asked if url != "about:srcdoc"] == [
        page.path.as_uri() for page in opened
    ]


def test_it_opens_from_a_file_and_draws_every_chart(report: Open, healthy: Scope) -> None:
    page = report(healthy)
    assert page.run("location.protocol") == "file:"
    assert "no defect found" in page.run("document.getElementById('verdict').innerText")
    for key in (
        "loss", "lr", "norm", "flow", "ratios", "anatomy-parts", "anatomy-state",
        "anatomy-effective", "anatomy-residual", "anatomy-cosine",
    ):  # fmt: skip
        page.plot(key)
        page.settle()
        assert page.n_colours(key) > 8, key


def test_pointing_at_a_step_tells_its_exact_values_in_every_chart(
    report: Open, healthy: Scope
) -> None:
    page = report(healthy)
    steps = healthy.steps
    assert page.readout("loss") == f"step 19 loss {steps['loss'].iloc[-1]:.6g}"
    page.point("loss", 0.02)
    assert page.readout("loss") == f"step 0 loss {steps['loss'].iloc[0]:.6g}"
    assert page.readout("norm").startswith(
        f"step 0 gradient norm {steps['grad_norm'].iloc[0]:.5g}"[:26]
    )
    assert page.readout("lr") == "step 0 learning rate 0.01"
    crosses = "[...document.querySelectorAll('.cross')].filter(c => !c.hidden).length"
    assert page.run(crosses) == 10


def test_arrow_keys_go_from_step_to_step(report: Open, healthy: Scope) -> None:
    page = report(healthy)
    page.run("document.querySelector('[data-chart=\"loss\"] .plot').focus()")
    page.browser.press("ArrowLeft")
    page.settle()
    assert page.readout("loss").startswith("step 18 ")
    page.run("""document.activeElement.dispatchEvent(
        new KeyboardEvent("keydown", {key: "Home", bubbles: true}))""")
    page.settle()
    assert page.readout("norm").startswith("step 0 ")


def test_dragging_zooms_all_charts_and_a_button_shows_all_again(
    report: Open, healthy: Scope
) -> None:
    page = report(healthy)
    x, y, width, height = page.plot("norm")
    button = "document.querySelector('#steps .reset')"
    assert page.run(f"{button}.hidden")
    page.browser.drag([(x + share * width, y + height / 2) for share in (0.3, 0.35, 0.4, 0.5, 0.6)])
    page.wait_for(f"!{button}.hidden")
    page.settle()
    page.point("loss", 0.03)
    first = int(page.readout("loss").split()[1])
    assert 2 < first < 10  # what was the first third is gone, in another chart too
    page.run(f"{button}.click()")
    page.wait_for(f"{button}.hidden")
    page.point("loss", 0.03)
    assert page.readout("loss").startswith("step 0 ")


def test_a_cell_of_the_flow_tells_parameter_step_norm_and_status(
    report: Open, healthy: Scope
) -> None:
    page = report(healthy)
    page.point("flow", 0.05, 0.1)
    grads = healthy.grads
    first = grads.loc[(grads["param"] == "0.weight") & (grads["step"] == 0), "norm"].iloc[0]
    assert page.readout("flow") == f"0.weight · step 0 · gradient norm {first:.4g} · fresh"
    names = "[...document.querySelectorAll('.names span')].map(s => s.textContent)"
    assert page.run(names) == ["0.weight", "0.bias", "2.weight", "2.bias"]


def test_another_parameter_changes_the_anatomy(report: Open, healthy: Scope) -> None:
    page = report(healthy)
    select = "document.getElementById('anatomy-param')"
    assert page.run(f"[...{select}.options].map(o => o.text)") == [
        "0.weight", "0.bias", "2.weight", "2.bias",
    ]  # fmt: skip
    before = page.readout("anatomy-parts")
    page.run(f"{select}.focus()")
    page.browser.press("ArrowDown")
    page.browser.press("ArrowDown")
    page.settle()
    assert page.run(f"{select}.value") == "2.weight"
    assert page.run("document.getElementById('ratio-param').value") == "2.weight"
    assert page.readout("anatomy-parts") != before
    last = healthy.updates.loc[lambda t: t["param"] == "2.weight"].iloc[-1]
    numbers = page.run("document.getElementById('facts').innerText")
    assert f"{last['update_norm']:.4g}" in numbers
    assert "Step 19" in page.run("document.getElementById('facts-title').innerText")
    page.run("document.getElementById('next').click()")
    page.settle()
    assert page.run(f"{select}.value") == "2.bias"


def test_the_nearest_line_of_the_ratios_is_named(report: Open, healthy: Scope) -> None:
    page = report(healthy)
    updates = healthy.updates
    at = updates.loc[updates["step"] == 10].set_index("param")["update_ratio"]
    page.point("ratios", 0.55, 0.02)
    name = page.readout("ratios").split(" · ")[0]
    step = int(page.readout("ratios").split(" · ")[1].split()[1])
    at = updates.loc[updates["step"] == step].set_index("param")["update_ratio"]
    assert name == at.idxmax()


def test_the_graph_is_explored_inside_of_the_page(report: Open, healthy: Scope) -> None:
    page = report(healthy)
    page.run("document.getElementById('explorer').scrollIntoView()")
    inner = "document.getElementById('explorer').contentDocument"
    page.wait_for(f"{inner}?.querySelector('#world .box') != null")
    boxes = f"{inner}.querySelectorAll('#world [role=button]').length"
    page.run(f"{inner}.getElementById('close-all').click()")
    closed = page.run(boxes)
    page.run(f"{inner}.getElementById('open-all').click()")
    assert page.run(boxes) > closed


def test_colours_follow_the_system_until_they_are_switched(report: Open, healthy: Scope) -> None:
    page = report(healthy)
    painted = """[...Bokeh.documents[0].all_models].find(m => m.type === 'Figure')
        .background_fill_color"""
    assert page.run(PAPER) == LIGHT
    page.browser.prefers("dark")
    page.settle()
    assert page.run(PAPER) == DARK
    assert "#12181f" in str(page.run(painted))
    page.run("document.getElementById('theme').click()")
    assert page.run(PAPER) == LIGHT
    assert "#ffffff" in str(page.run(painted))


def test_a_table_is_sorted_by_its_headings(report: Open, healthy: Scope) -> None:
    page = report(healthy)
    names = "[...document.querySelectorAll('#parameter-table tbody th')].map(t => t.innerText)"
    head = "[...document.querySelectorAll('#parameter-table thead button')]"
    page.run(f"{head}.find(b => b.innerText === 'numbers').click()")
    assert page.run(names) == ["2.bias", "0.bias", "2.weight", "0.weight"]
    page.run(f"{head}.find(b => b.innerText === 'numbers').click()")
    assert page.run(names) == ["0.weight", "2.weight", "0.bias", "2.bias"]


@pytest.mark.parametrize("width", [390, 320])
def test_it_fits_a_phone(report: Open, healthy: Scope, width: int) -> None:
    page = report(healthy)
    page.browser.window(width, 780, mobile=True)
    page.browser.open(page.path)
    page.browser.requests.pop()
    page.wait_for("document.documentElement.dataset.drawn === 'yes'")
    assert page.run("document.documentElement.scrollWidth") == width
    page.run("for (const d of document.querySelectorAll('details')) d.open = true")
    page.settle()
    assert page.run("document.documentElement.scrollWidth") == width


def test_a_finger_scrolls_past_a_chart_and_reads_it(report: Open, healthy: Scope) -> None:
    page = report(healthy)
    page.browser.window(390, 780, mobile=True)
    page.settle()
    x, y, width, height = page.plot("ratios")
    x, y = x + width / 2, y + height / 2
    before = page.run("scrollY")

    def touch(kind: str, *points: tuple[float, float]) -> None:
        at = [{"x": x, "y": y, "id": 0} for x, y in points]
        page.browser.call("Input.dispatchTouchEvent", type=kind, touchPoints=at)

    touch("touchStart", (x, y))
    for moved in range(20, 201, 20):
        touch("touchMove", (x + moved / 10, y - moved))
        time.sleep(0.016)
    touch("touchEnd")
    page.wait_for(f"scrollY > {before} + 100")
    assert page.run("[...document.querySelectorAll('.reset')].every(b => b.hidden)")


def test_it_prints_in_light_and_goes_back(report: Open, healthy: Scope) -> None:
    page = report(healthy)
    page.browser.prefers("dark")
    page.settle()
    page.run("dispatchEvent(new Event('beforeprint'))")
    assert page.run(PAPER) == LIGHT
    page.run("dispatchEvent(new Event('afterprint'))")
    assert page.run(PAPER) == DARK


def test_a_finding_marks_its_step_and_every_status_has_its_colour(report: Open) -> None:
    page = report(trained(12, zero_grad=False))
    assert "missing-zero-grad" in page.run("document.getElementById('verdict').innerText")
    page.point("flow", 0.5, 0.5)
    assert page.readout("flow").endswith("compounded")
    assert page.run("document.querySelectorAll('.scales li').length") == 2
    labels = "[...Bokeh.documents.at(-1).all_models].filter(m => m.type === 'Label')"
    assert set(page.run(f"{labels}.map(m => m.text)")) == {"GS201"}


def test_a_page_without_charts_has_no_complaint(report: Open) -> None:
    page = report(Scope(None), Findings([]))
    assert page.run("document.querySelectorAll('.plot').length") == 0


@pytest.mark.parametrize("name", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_names_are_shown_and_never_run(report: Open, name: str) -> None:
    scope = trained(4)
    scope._settle()
    run = scope._recording
    in_tables = name.replace("\ud800", "")  # pandas keeps no lone surrogate
    for entry in run.parameters:
        entry.name = f"{in_tables}{entry.name}"
        entry.module = entry.module_type = in_tables
    run.optimizers[0].name = run.optimizers[0].kind = run.models[0].name = in_tables
    finding = Finding(
        name, name, Severity.ERROR, name, name,
        params=(name,), step_first=1, file=name, line=3, evidence={name: name}, symptoms=(name,),
    )  # fmt: skip
    page = report(scope, Findings([finding, finding], {name: name}))
    page.point("flow", 0.5, 0.3)
    page.point("ratios", 0.5, 0.3)
    for select in ("ratio-param", "anatomy-param"):
        page.run(f"""(s => {{ s.selectedIndex = 2; s.dispatchEvent(new Event('change')) }})
            (document.getElementById('{select}'))""")
    page.run("document.getElementById('explorer').scrollIntoView()")
    inner = "document.getElementById('explorer').contentDocument"
    page.wait_for(f"{inner}?.querySelector('#world .box') != null")
    page.settle()
    assert page.run("typeof window.hacked") == "undefined"
    assert page.run("document.querySelectorAll('script').length") == 3
    assert page.run("document.querySelectorAll('img, object, embed, link').length") == 0
    assert page.run("'MathJax' in window") is False
    assert page.run("document.documentElement.scrollWidth") <= 1280
