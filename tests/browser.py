"""Headless Chromium for the tests of pages; they are skipped where it is not installed."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.support.ui import WebDriverWait

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
needs_browser = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="no Chromium is installed: apt-get install chromium chromium-driver"
)


class Page:
    """A page of bypass_fx in Chromium."""

    def __init__(self, driver: webdriver.Chrome) -> None:
        self.driver = driver

    def open(self, file: Path) -> None:
        """Load the page, and wait until the graph is drawn."""
        self.driver.get(file.as_uri())
        WebDriverWait(self.driver, 30, poll_frequency=0.02).until(lambda _: self.js("return window.drawnAfter"))

    def js(self, code: str, *arguments: Any) -> Any:
        """Run JavaScript and return what it returns."""
        return self.driver.execute_script(code, *arguments)

    def text(self, selector: str) -> str:
        """The text that an element shows."""
        return str(self.driver.find_element("css selector", selector).text)

    def press(self, *keys: str) -> None:
        """Press keys in the graph."""
        self.js("document.getElementById('graph').focus({preventScroll: true})")
        ActionChains(self.driver, duration=0).send_keys(*keys).perform()

    def type(self, text: str) -> None:
        """Type into the search field."""
        field = self.driver.find_element("id", "search")
        field.clear()
        field.send_keys(text)

    def click(self, node: str, times: int = 1) -> None:
        """Click a node of the graph, where it is drawn."""
        at = self.js("const e = view.cy.getElementById(arguments[0]); return e.renderedPosition()", node)
        graph = self.driver.find_element("id", "graph")
        half = (graph.size["width"] / 2, graph.size["height"] / 2)
        chain = ActionChains(self.driver, duration=0)
        chain.move_to_element_with_offset(graph, round(at["x"] - half[0]), round(at["y"] - half[1]))
        for _ in range(times):
            chain.click()
        chain.perform()

    def shown(self) -> list[str]:
        """The ids of the nodes that are drawn."""
        return list(self.js("return view.cy.nodes('[^of]').map((node) => node.id())"))

    def color(self, node: str) -> str:
        """The colour of a drawn node."""
        return str(self.js("return view.cy.getElementById(arguments[0]).style('background-color')", node))

    def complaints(self) -> list[Any]:
        """What the browser's console holds."""
        return list(self.driver.get_log("browser"))  # type: ignore[no-untyped-call]


@contextmanager
def browsing(width: int = 1400, height: int = 900, dark: bool = False) -> Iterator[Page]:
    """A browser without a network, closed at the end."""
    options = webdriver.ChromeOptions()
    if CHROMIUM:
        options.binary_location = CHROMIUM
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"):
        options.add_argument(argument)
    options.add_argument(f"--window-size={width},{height}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    try:
        driver.execute_cdp_cmd("Network.enable", {})
        driver.execute_cdp_cmd(
            "Network.emulateNetworkConditions",
            {"offline": True, "latency": 0, "downloadThroughput": 0, "uploadThroughput": 0},
        )
        scheme = "dark" if dark else "light"
        driver.execute_cdp_cmd(
            "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        )
        yield Page(driver)
    finally:
        driver.quit()


def data_of(page: str) -> Any:
    """The data in a page's text."""
    return json.loads(page.partition('id="data">')[2].partition("</script>")[0])
