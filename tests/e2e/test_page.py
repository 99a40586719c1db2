"""The page in headless Chromium: sites are clicked and read, modules opened and closed, things found, keys pressed."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.pages import model_named
from bypass_fx import models
from bypass_fx.inspection import Residuals, inspect, write
from tests.browser import Page, browsing, needs_browser

pytestmark = needs_browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Page]:
    with browsing() as page:
        yield page


def opened(browser: Page, folder: Path, model: nn.Module, inputs: Any = None, **options: Any) -> Page:
    file = folder / "page.html"
    write(inspect(model, "net", example_inputs=inputs), file, **options)
    browser.open(file)
    return browser


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pages")


@pytest.fixture
def vit(browser: Page, folder: Path) -> Page:
    file = folder / "vit.html"
    if not file.exists():
        model = models.build_empty("timm:vit_tiny_patch16_224")
        write(inspect(model, "timm:vit_tiny_patch16_224", select="*.mlp.act"), file)
    browser.open(file)
    return browser


def test_it_opens_with_the_blocks_closed_and_no_complaint(vit: Page) -> None:
    shown = vit.shown()
    assert {"blocks", "blocks.0", "blocks.11"} <= set(shown) and not any(name.startswith("blocks.0.") for name in shown)
    assert vit.text("h1").startswith("timm:vit_tiny_patch16_224")
    assert vit.text("#found") == "12 sites, 0 refused"
    assert vit.complaints() == []


def test_a_site_in_the_list_leads_to_its_formula_with_the_actual_shapes(vit: Page) -> None:
    vit.driver.find_elements("css selector", "#list button")[3].click()
    panel = vit.text("#panel")
    assert "ψ(z) = gelu(z) + D z" in panel and "A D W = 0" in panel
    assert re.search(r"z 1 × 197 × 768 ", panel) and re.search(r"W 768 × 192 blocks\.3\.mlp\.fc1 \(linear\)", panel)
    assert re.search(r"A 192 × 768 blocks\.3\.mlp\.fc2", panel) and "A's bias can take the constant" in panel
    assert "blocks.3.mlp#act" in vit.shown()


def test_a_double_click_opens_a_module_and_closes_it_again(vit: Page) -> None:
    vit.js("view.show('blocks.1')")
    vit.click("blocks.1", times=2)
    assert "blocks.1.mlp" in vit.shown()
    vit.js("view.show('blocks.1.mlp')")
    vit.click("blocks.1.mlp", times=2)
    vit.js("view.fit()")
    vit.click("blocks.1.mlp#act")
    assert "ψ(z) = gelu(z) + D z" in vit.text("#panel")
    vit.js("view.toggle('blocks.1')")
    assert not any(name.startswith("blocks.1.") for name in vit.shown())


def test_modules_lie_inside_the_ones_around_and_beside_each_other(vit: Page) -> None:
    vit.js("graph.reveal('blocks.2.mlp#act'); view.draw()")
    boxes = vit.js("""
        return view.cy.nodes('[^of]').map((node) => {
          const {x, y} = node.position(), w = node.width() / 2, h = node.height() / 2;
          return [node.id(), graph.nodes.get(node.id()).parent, x - w, y - h, x + w, y + h];
        });""")
    place = {name: box for name, _, *box in boxes}
    for name, parent, left, top, right, bottom in boxes:
        if parent in place:
            outer = place[parent]
            assert outer[0] < left and outer[1] < top and right < outer[2] and bottom < outer[3], (name, parent)
        for other, beside, x1, y1, x2, y2 in boxes:
            apart = right <= x1 or x2 <= left or bottom <= y1 or y2 <= top
            assert apart or parent != beside or name == other, (name, other)
    assert len({parent for _, parent, *_ in boxes}) == 4
    # what is drawn later lies above: modules, edges, values, titles
    order = vit.js("""
        const height = (element) => Number(element.style("z-index"));
        return view.cy.elements().sort((a, b) => height(a) - height(b)).map((element) => element.id());""")
    spots = [order.index(name) for name in ("blocks", "blocks.2", "blocks.2.mlp")]
    edges = [index for index, name in enumerate(order) if name.startswith("→")]
    assert spots == sorted(spots) and max(spots) < min(edges)
    assert max(edges) < order.index("blocks.2.mlp#act") < order.index("≡ blocks.2.mlp")


def test_search_finds_and_shows(vit: Page) -> None:
    vit.type("blocks.7.attn.qkv")
    assert vit.text("#found") == "1 found"
    vit.driver.find_element("id", "search").send_keys("\ue007")
    assert "blocks.7.attn#qkv" in vit.shown() and "in_features=192" in vit.text("#panel")
    vit.type("nothing is called this")
    assert vit.text("#found") == "0 found" and vit.text("#list") == ""


def test_the_switch_shows_psi_after_the_surgery(vit: Page) -> None:
    vit.js("graph.reveal('blocks.0.mlp#act'); view.draw()")
    before = set(vit.shown())
    vit.driver.find_element("css selector", "input[value=after]").click()
    assert set(vit.shown()) - before == {"blocks.0.mlp#psi", "blocks.0.mlp#delta_act"}
    into = vit.js("return view.cy.getElementById('blocks.0.mlp#psi').incomers('node').map((node) => node.id()).sort()")
    assert into == ["blocks.0.mlp#act", "blocks.0.mlp#delta_act", "blocks.0.mlp#fc1"]
    out = vit.js("return view.cy.getElementById('blocks.0.mlp#psi').outgoers('node').map((node) => node.id())")
    assert out == ["blocks.0.mlp#drop1"]
    vit.press("b")
    assert set(vit.shown()) == before


def test_the_chosen_node_stays_where_it_is_when_the_surgery_is_shown(vit: Page) -> None:
    vit.js("go('blocks.11.mlp#act')")
    where = "return view.cy.getElementById('blocks.11.mlp#act').renderedPosition()"
    before = vit.js(where)
    vit.press("b")
    assert "blocks.11.mlp#psi" in vit.shown()
    assert vit.js(where) == pytest.approx(before, abs=1)


def test_keys_are_enough(vit: Page) -> None:
    vit.press("n")
    assert vit.js("return chosen") == "blocks.0.mlp#act"
    vit.press("\ue015")  # arrow down
    assert vit.js("return chosen") == "blocks.0.mlp#drop1"
    vit.press("\ue013")  # arrow up
    vit.press("\ue003")  # backspace
    assert vit.js("return chosen") == "blocks.0.mlp"
    vit.press("\ue007")  # enter
    assert "blocks.0.mlp#act" not in vit.shown() and vit.text("#panel").endswith("Open")
    zoom = vit.js("return view.cy.zoom()")
    vit.press("+")
    assert vit.js("return view.cy.zoom()") > zoom
    vit.press("/")
    assert vit.js("return document.activeElement.id") == "search"


def test_dark_and_light(vit: Page) -> None:
    def ground() -> Any:
        return vit.js("return getComputedStyle(document.body).backgroundColor"), vit.color("blocks.0")

    light = ground()
    vit.driver.find_element("id", "theme").click()
    assert vit.js("return document.documentElement.dataset.theme") == "dark"
    assert all(a != b for a, b in zip(light, ground(), strict=True))


def test_the_page_follows_the_systems_dark_mode(folder: Path, vit: Page) -> None:
    with browsing(dark=True) as page:
        page.open(folder / "vit.html")
        assert page.js("return document.documentElement.dataset.theme") == "dark"


def test_forwards_without_a_graph_and_refusals_are_shown_with_their_reason(browser: Page, folder: Path) -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.act = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)), nn.Tanh()

        def forward(self, x: Tensor) -> Any:
            return self.inner(x) if x.sum() > 0 else self.act(x)

    page = opened(browser, folder, Branching(), (torch.zeros(2, 4),))
    assert {"(model)#forward", "inner"} <= set(page.shown())
    assert page.js("return view.cy.edges('.unseen').length") >= 1
    assert page.text("#list").splitlines() == ["inner.1", "act"]
    page.driver.find_elements("css selector", "#list button")[1].click()
    assert "it stands in no residual block" in page.text("#panel") and "mode='all' takes it" in page.text("#panel")


@pytest.mark.parametrize(
    ("name", "site", "says"),
    [
        ("timm:resnet18", "layer2.1.act1", "axis 1 holds the channels"),
        ("timm:vit_base_patch16_224", "blocks.5.attn.scaled_dot_product_attention", "ψ(V) = attention(Q, K, V) + D V"),
        ("timm:convnext_tiny", "stages.2.blocks.4.mlp.act", "384 stages.2.blocks.4.mlp.fc1"),
        ("timm:efficientnet_b0", "blocks.3.1.se.act1", "A D W = 0"),
        ("torchvision:fasterrcnn_resnet50_fpn", "roi_heads.box_head.relu", "1024 × 12544 roi_heads.box_head.fc6"),
        ("torch.nn:Transformer", "decoder.layers.3.self_attn.attention", "10 × 1 × 512"),
    ],
)
def test_every_kind_of_model_can_be_looked_at(browser: Page, folder: Path, name: str, site: str, says: str) -> None:
    model, inputs = model_named(name)
    page = opened(browser, folder, model, inputs)
    assert "How to read this".upper() in page.text("#panel") and page.text("#legend").startswith("strict, folded")
    page.type(site)
    page.driver.find_elements("css selector", "#list button")[0].click()
    chosen = page.js("return chosen")
    page.js("view.select('nothing'); chosen = null; showPanel(graph.root)")
    page.click(chosen)
    assert page.js("return chosen") == chosen and says in page.text("#panel")
    page.driver.find_element("css selector", "input[value=after]").click()
    psi = page.js("return data.nodes.find((node) => node.stage === 'after' && node.site === arguments[0]).id", site)
    assert psi in page.shown()
    inside = page.js("return graph.nodes.get(chosen).parent")
    page.js("go(arguments[0])", inside)
    page.press("\ue007")
    assert chosen not in page.shown() and inside in page.shown()
    page.driver.find_element("id", "close-all").click()
    assert page.js("return graph.open.size") == 1
    assert page.complaints() == [] and page.js("return performance.getEntriesByType('resource').length") == 0


def test_names_from_the_model_are_text_and_no_markup(browser: Page, folder: Path) -> None:
    evil = type("<img src=x onerror=alert(1)>", (nn.ReLU,), {})()
    model = nn.Sequential(nn.Linear(4, 4))
    for name, module in (("<b>'&", evil), ("[red] {0-3}", nn.Linear(4, 4))):
        model.add_module(name, module)
    page = opened(browser, folder, model, (torch.zeros(1, 4),))
    page.press("n")
    assert "<img src=x onerror=alert(1)>" in page.text("#panel")
    assert page.js("return document.querySelectorAll('img, b').length") == 0 and page.complaints() == []


def test_many_children_are_drawn_in_parts_in_the_order_of_the_dataflow(browser: Page, folder: Path) -> None:
    model = nn.Sequential(*(nn.Sequential(nn.Linear(2, 2), nn.ReLU()) for _ in range(900)))
    page = opened(browser, folder, model)
    parts = page.js("return graph.children(graph.root).map((id) => [id, graph.nodes.get(id).label])")
    assert 20 < len(parts) < 40 and parts[0][1].startswith("input … ") and parts[-1][1].endswith(" … result")
    held = page.js("return graph.children(graph.root).map((part) => graph.children(part))")
    assert [number for part in held for number in sorted(int(name) for name in part if name.isdigit())] == list(
        range(900)
    )
    assert len(page.shown()) == len(parts)
    page.js("go('450#_1')")
    assert "450#_1" in page.shown() and len(page.shown()) < 80


def test_blocks_that_only_code_without_a_graph_calls_stand_in_columns(browser: Page, folder: Path) -> None:
    class Loops(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(12))

        def forward(self, x: Tensor) -> Any:
            for block in self.blocks:
                x = block(x) if x.sum() > 0 else x
            return x

    page = opened(browser, folder, Loops())
    page.js("go('blocks.0')")
    places = page.js("return graph.children('blocks').map((id) => [view.places.get(id).x, view.places.get(id).y])")
    assert len({x for x, _ in places}) == 2 and len({y for _, y in places}) == 6
    assert page.js("return view.cy.edges('.unseen').map((edge) => edge.target().id())") == ["blocks"]


def test_a_slider_colours_the_sites_by_their_norms_over_a_run(browser: Page, folder: Path) -> None:
    run = Residuals((10, 20, 30), ("opt1", "opt1", "opt2"), {"1": (1.0, 4.0, 0.0), "3": (2.0, 1.0, 0.5)})
    model = models.build("mlp")
    page = opened(browser, folder, model, (torch.zeros(1, 64),), run=run)
    colors = []
    for step in range(3):
        page.js("const s = document.getElementById('step'); s.value = arguments[0]; s.oninput()", step)
        colors.append((page.color("(model)#_1"), page.color("(model)#_3")))
    assert len({first for first, _ in colors}) == 3 and colors[0][0] == colors[1][1]  # one norm, one colour
    assert page.text("#step-value") == "30 (opt2)"
    page.press("n")
    assert "0.00 at step 30, highest 4.00" in page.text("#panel")


def test_of_five_thousand_nodes_only_those_in_sight_are_laid_out(browser: Page, folder: Path) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.act, self.second = nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.second(self.act(self.first(x))) * 0.5

    stages = [nn.Sequential(*(Block() for _ in range(25))) for _ in range(25)]
    page = opened(browser, folder, nn.Sequential(*stages))
    assert page.js("return data.nodes.length") > 5000 and len(page.shown()) < 100
    page.js("view.show('12.12#act')")
    assert "12.12#act" in page.shown() and len(page.shown()) < 150
