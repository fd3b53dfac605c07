"""The page to explore a graph with, in a real browser, used as a person would."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from chromium import PROGRAM, Chromium
from test_explorer import HOSTILE, data_of, gpt, named, with_saved

from gradscope.graphs.explorer import explorer_page
from gradscope.graphs.overlay import StepFacts
from gradscope.run.captured_graph import CapturedGraph

pytestmark = pytest.mark.skipif(PROGRAM is None, reason="there is no Chromium on the PATH")

FACTS = StepFacts(
    grad_norm={"h.0.ln.weight": 0.5, "h.1.ln.weight": 4e-3, "wte.weight": float("nan")},
    grad_status={"h.1.ln.weight": "stale"},
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    chromium = Chromium(tmp_path_factory.mktemp("profile"))
    yield chromium
    chromium.close()


class Explorer:
    """A page that is open in a browser."""

    def __init__(self, browser: Chromium, path: Path) -> None:
        self.browser = browser
        self.path = path
        browser.open(path)

    def run(self, script: str) -> Any:
        return self.browser.run(script)

    def labels(self) -> list[str]:
        """What is said of every box that is shown, in the order of the Tab key."""
        boxes = "[...document.querySelectorAll('#world [role=button]')]"
        return list(self.run(f"{boxes}.map(box => box.ariaLabel)"))

    def element(self, start: str) -> str:
        """The first box of which is said something that starts like this, as an expression."""
        return f"document.querySelector('#world [role=button][aria-label^=\"{start}\"]')"

    def is_open(self, start: str) -> bool:
        return bool(self.run(f"{self.element(start)}.ariaExpanded") == "true")

    def place(self, element: str) -> tuple[float, float, float, float]:
        script = f"(r => [r.x, r.y, r.width, r.height])({element}.getBoundingClientRect())"
        x, y, width, height = self.run(script)
        return x, y, width, height

    def click(self, element: str) -> None:
        x, y, width, height = self.place(element)
        self.browser.click(x + width / 2, y + height / 2)

    def click_box(self, start: str) -> None:
        self.click(self.element(start))

    def card(self) -> str | None:
        shown = "document.getElementById('card')"
        return None if self.run(f"{shown}.hidden") else str(self.run(f"{shown}.innerText"))

    def transform(self) -> tuple[float, float, float]:
        """x, y and scale of the picture."""
        matrix = "new DOMMatrix(getComputedStyle(document.getElementById('world')).transform)"
        x, y, scale = self.run(f"(m => [m.e, m.f, m.a])({matrix})")
        return x, y, scale

    def search(self, text: str) -> list[str]:
        """Search, and return the titles of what is found."""
        self.browser.press("/")
        self.run("document.activeElement.value = ''")
        self.browser.write(text)
        options = "[...document.querySelectorAll('#found [role=option]')]"
        return list(self.run(f"{options}.map(option => option.firstChild.textContent)"))

    def in_view(self, start: str) -> bool:
        x, y, width, height = self.place(self.element(start))
        left, top, wide, high = self.place("document.getElementById('view')")
        return left <= x and top <= y and x + width <= left + wide and y + height <= top + high


@pytest.fixture
def explorer(browser: Chromium, tmp_path: Path) -> Iterator[Any]:
    """Opens pages; afterwards nothing may have been asked of anyone, or gone wrong."""
    opened: list[Explorer] = []
    browser.requests.clear()
    browser.complaints.clear()
    browser.window(1280, 860)
    browser.prefers("light")

    def open_page(captured: CapturedGraph, **more: Any) -> Explorer:
        path = tmp_path / "explorer.html"
        path.write_text(explorer_page(captured, **more), encoding="utf-8")
        opened.append(Explorer(browser, path))
        return opened[-1]

    yield open_page
    assert browser.complaints == []
    assert browser.requests == [page.path.as_uri() for page in opened]


def test_it_opens_from_a_file_as_the_picture_shows_the_graph(explorer: Any) -> None:
    page = explorer(gpt(14))
    assert page.run("location.protocol") == "file:"
    assert page.run("document.title") == "autograd graph: 87 operations, 43 parameters"
    assert [label.split(",")[0] for label in page.labels()] == [
        "GPT",
        "embedding",
        "h.0 … h.13 ×14",
        "ln",
        "mlp",
        "up",
        "down",
        "add",
        "mm",
        "nll_loss",
        "wte.weight = head.weight",
    ]
    assert page.is_open("h.0")
    assert page.card() is None


def test_a_box_opens_and_closes_by_click_and_stays_under_the_pointer(explorer: Any) -> None:
    page = explorer(gpt(14))
    before = page.labels()
    x, y, width, _ = page.place(page.element("ln"))
    page.click_box("ln")
    assert page.is_open("ln")
    assert "native_layer_norm" in page.labels()
    x2, y2, width2, _ = page.place(page.element("ln"))
    assert (x2, y2) == pytest.approx((x, y), abs=2)
    assert width2 > width
    assert page.run("document.activeElement.box") is not None
    page.click_box("ln")
    assert not page.is_open("ln")
    assert page.labels() == before


def test_a_box_opens_and_closes_by_keyboard(explorer: Any) -> None:
    page = explorer(gpt(14))
    while not page.run("(document.activeElement.ariaLabel || '').startsWith('mlp')"):
        page.browser.press("Tab")
    assert page.in_view("mlp")
    for key, is_open in ((" ", False), ("Enter", True), ("Enter", False), (" ", True)):
        page.browser.press(key)
        assert page.is_open("mlp") is is_open
        assert page.run("document.activeElement.ariaLabel").startswith("mlp")
    assert page.card().startswith("×\nmlp")
    page.browser.press("Escape")
    assert page.card() is None
    assert page.run("document.activeElement.ariaLabel").startswith("mlp")


def test_what_is_opened_has_room_for_what_is_inside(explorer: Any) -> None:
    page = explorer(gpt(14))
    page.click("document.getElementById('open-all')")
    script = """(() => {
        const inside = (a, b) => a.left >= b.left - 1 && a.right <= b.right + 1
            && a.top >= b.top - 1 && a.bottom <= b.bottom + 1;
        const apart = (a, b) => a.right <= b.left + 1 || b.right <= a.left + 1
            || a.bottom <= b.top + 1 || b.bottom <= a.top + 1;
        const wrong = [];
        for (const holder of document.querySelectorAll('.inside')) {
            const children = [...holder.children].filter(child => child.tagName !== 'svg');
            const places = children.map(child => child.getBoundingClientRect());
            places.forEach((place, i) => {
                const outer = holder.parentNode.getBoundingClientRect();
                if (holder.parentNode.id !== 'world' && !inside(place, outer)) wrong.push('out');
                if (!places.slice(0, i).every(other => apart(place, other))) wrong.push('over');
            });
        }
        return wrong;
    })()"""
    assert page.run(script) == []
    assert page.run("document.querySelectorAll('.frame').length") == 6


def test_arrows_end_at_boxes_however_much_is_opened(explorer: Any) -> None:
    page = explorer(gpt(14))
    script = """[...document.querySelectorAll('.inside')].flatMap(holder => {
        const boxes = [...holder.children].filter(child => child.tagName !== 'svg')
            .map(child => child.getBoundingClientRect());
        const touches = ({x, y}) => boxes.some(box => x >= box.left - 3 && x <= box.right + 3
            && y >= box.top - 3 && y <= box.bottom + 3);
        return [...holder.querySelectorAll(':scope > svg path')].map(path => {
            const matrix = path.getScreenCTM(), ends = [0, path.getTotalLength()];
            return ends.every(at => touches(path.getPointAtLength(at).matrixTransform(matrix)));
        });
    })"""
    few = page.run(script)
    page.click("document.getElementById('open-all')")
    many = page.run(script)
    assert 5 < len(few) < len(many)
    assert all(few)
    assert all(many)


def test_all_boxes_open_and_close_at_once(explorer: Any) -> None:
    page = explorer(gpt(14))
    page.click("document.getElementById('close-all')")
    assert [label.split(",")[0] for label in page.labels()] == ["GPT"]
    page.click("document.getElementById('open-all')")
    data = data_of(gpt(14))
    assert len(page.labels()) == len(data["boxes"])


def test_search_reveals_what_lies_deep_inside(explorer: Any) -> None:
    page = explorer(gpt(14))
    page.click("document.getElementById('close-all')")
    assert page.search("h.0.mlp.down.weight") == ["weight"]
    page.browser.press("Enter")
    assert page.is_open("GPT")
    assert page.is_open("h.0")
    assert page.is_open("mlp")
    assert page.is_open("down")
    assert not page.is_open("up")
    assert page.in_view("weight")
    assert "h.0.mlp.down.weight" in page.card()


def test_search_finds_names_of_other_copies_classes_and_autograd_nodes(explorer: Any) -> None:
    page = explorer(gpt(14))
    assert page.search("h.2.mlp.up.weight") == ["weight"]
    assert page.search("LayerNorm") == ["ln", "native_layer_norm"]
    assert page.search("NllLossBackward0") == ["nll_loss"]
    assert page.search("no such thing") == []
    assert "nothing found" in page.run("document.getElementById('found').innerText")
    page.browser.press("Escape")
    assert page.run("document.getElementById('found').hidden")
    titles = page.search("add")
    page.browser.press("ArrowDown")
    chosen = page.run(
        "document.querySelector('#found [aria-selected=true]').firstChild.textContent"
    )
    assert chosen == titles[1]


def test_the_card_says_what_is_known_of_an_operation(explorer: Any) -> None:
    page = explorer(with_saved(gpt(14)), facts=FACTS)
    page.click_box("embedding")
    card = page.card()
    for text in (
        "EmbeddingBackward0",
        "GPT",
        "2 × 3 float32",
        "self: packed by a hook",
        "sequence number\n0",
        "goes to\nh.0 … h.13 ×14",
    ):
        assert text in card.replace("  ", " ")
    page.click("document.getElementById('shut')")
    assert page.card() is None


def test_the_card_lists_gradients_of_all_copies(explorer: Any) -> None:
    page = explorer(gpt(14), facts=FACTS)
    page.click_box("ln")
    rows = page.run(
        "[...document.querySelectorAll('#card tr')].map(r => [...r.cells].map(c => c.textContent))"
    )
    assert rows == [
        ["parameter", "shape", "|grad|", "status"],
        ["h.0.ln.weight", "2 × 3", "0.5", ""],
        ["h.1.ln.weight", "2 × 3", "0.004", "stale"],
        *([f"h.{i}.ln.weight", "2 × 3", "", ""] for i in range(2, 14)),
    ]
    assert page.run("document.querySelector('#card td.bad').textContent") == "stale"


def test_ports_and_neighbours_lead_to_boxes(explorer: Any) -> None:
    page = explorer(gpt(14))
    page.click("[...document.querySelectorAll('.port')].find(p => p.textContent === 'to mm')")
    assert page.card().startswith("×\nmm")
    page.run("[...document.querySelectorAll('#card .links button')].at(-1).focus()")
    page.browser.press("Enter")
    assert page.card().startswith("×\nnll_loss")
    assert "backward starts here" in page.card()


def test_an_overlay_colours_boxes_and_explains_itself(explorer: Any) -> None:
    page = explorer(gpt(14), facts=FACTS)
    background = f"getComputedStyle({page.element('ln')}).backgroundColor"
    before = page.run(background)
    page.run("document.getElementById('overlay').focus()")
    page.browser.write("g")
    page.browser.press("ArrowDown")
    assert page.run("document.getElementById('overlay').value") == "grad_norm"
    assert page.run(background) != before
    assert page.run(f"{page.element('ln')}.querySelector('.mark').textContent") == "0.004 … 0.5"
    legend = page.run("document.getElementById('legend-text').textContent")
    assert legend.startswith("gradient norm: L2 norm of the gradient, the greatest in a box.")
    alarm = page.run(f"getComputedStyle({page.element('wte.weight')}).backgroundColor")
    assert alarm == "rgb(248, 113, 113)"


def test_without_facts_there_is_no_overlay_to_choose(explorer: Any) -> None:
    page = explorer(gpt(14))
    assert page.run("document.getElementById('overlay').hidden")


def test_the_picture_is_dragged_with_the_pointer(explorer: Any) -> None:
    page = explorer(gpt(14))
    x, y, scale = page.transform()
    page.browser.drag([(900, 500), (920, 520), (960, 470)])
    assert page.transform() == pytest.approx((x + 60, y - 30, scale), abs=0.2)
    bx, by, width, height = page.place(page.element("ln"))
    cx, cy = bx + width / 2, by + height / 2
    page.browser.drag([(cx, cy), (cx + 30, cy + 30)])  # begins on a box, and opens none
    assert not page.is_open("ln")
    assert page.card() is None


def test_the_wheel_zooms_at_the_pointer(explorer: Any) -> None:
    page = explorer(gpt(14))
    x, y, scale = page.transform()
    left, top, *_ = page.place("document.getElementById('view')")
    page.browser.wheel(700, 400, -100)
    x2, y2, scale2 = page.transform()
    assert scale2 > 1.1 * scale
    at = (700 - left - x) / scale, (400 - top - y) / scale
    assert ((700 - left - x2) / scale2, (400 - top - y2) / scale2) == pytest.approx(at, abs=0.5)


def test_two_fingers_zoom(explorer: Any) -> None:
    page = explorer(gpt(14))
    *_, scale = page.transform()
    page.browser.pinch(600, 400, 50, 100)
    assert page.transform()[2] == pytest.approx(2 * scale, rel=0.1)


def test_keys_move_zoom_and_fit(explorer: Any) -> None:
    page = explorer(gpt(14))
    x, y, scale = page.transform()
    page.browser.press("ArrowLeft")
    page.browser.press("ArrowDown")
    assert page.transform() == pytest.approx((x + 60, y - 60, scale), abs=0.2)
    page.browser.press("+")
    assert page.transform()[2] == pytest.approx(1.25 * scale, rel=1e-3)
    page.browser.press("-")
    assert page.transform()[2] == pytest.approx(scale, rel=1e-3)
    page.browser.press("0")
    assert page.in_view("GPT")
    assert page.in_view("nll_loss")


def test_colours_follow_the_system_until_they_are_switched(explorer: Any) -> None:
    page = explorer(gpt(14))
    paper = "getComputedStyle(document.body).backgroundColor"
    light, dark = "rgb(255, 255, 255)", "rgb(18, 24, 31)"
    assert page.run(paper) == light
    page.browser.prefers("dark")
    assert page.run(paper) == dark
    page.click("document.getElementById('theme')")
    assert page.run(paper) == light
    page.click("document.getElementById('theme')")
    assert page.run(paper) == dark
    page.browser.prefers("light")
    assert page.run(paper) == dark


def test_it_fits_a_phone(explorer: Any) -> None:
    page = explorer(gpt(14), facts=FACTS)
    page.browser.window(390, 780, mobile=True)
    page.browser.open(page.path)
    page.browser.requests.pop()
    assert page.run("document.documentElement.scrollWidth") == 390
    x, _, width, _ = page.place("document.querySelector('.frame')")
    assert 0 <= x <= x + width <= 390
    page.click_box("add")
    _, top, wide, high = page.place("document.getElementById('card')")
    assert (wide, top + high) == (390, 780)
    assert high < 390


@pytest.mark.parametrize("name", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_names_are_shown_and_never_run(explorer: Any, name: str) -> None:
    facts = StepFacts(grad_status={name: name}, findings={name: name}, grad_norm={name: 1.0})
    page = explorer(named(name), facts=facts)
    page.click("document.getElementById('open-all')")
    for at in range(len(page.labels())):
        page.run(f"document.querySelectorAll('#world .box')[{at}]?.click()")
    page.search(name[:8].replace("\0", "").replace("\ud800", ""))
    assert page.run("typeof window.hacked") == "undefined"
    assert page.run("document.querySelectorAll('script').length") == 2
    assert page.run("document.querySelectorAll('img, b, iframe').length") == 0
    ends = "document.documentElement.scrollWidth <= innerWidth"
    assert page.run(ends)


def test_text_fits_into_its_box(explorer: Any) -> None:
    sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
    try:
        import architectures
    finally:
        sys.path.pop(0)
    from gradscope.instruments.autograd_graph import capture_graph
    from gradscope.instruments.call_log import CallLog, paths_of

    for name in ("gpt2", "unet", "mixture_of_experts", "detached_encoder"):
        model, loss_of = architectures.ARCHITECTURES[name]()
        log = CallLog(paths_of([("", model)]))
        log.start()
        loss = loss_of()
        log.stop()
        names = {id(p): n for n, p in model.named_parameters()}
        captured = log.attribute(
            capture_graph([loss], lambda leaf, n=names: (n[id(leaf)],), saved=True)
        )
        page = explorer(captured)
        page.click("document.getElementById('open-all')")
        clipped = page.run(
            "[...document.querySelectorAll('.box > *, .head')]"
            ".filter(e => e.scrollWidth > e.clientWidth + 1).map(e => e.textContent)"
        )
        assert clipped == []
