"""Pages in headless Chromium: how soon they are drawn, how long an interaction takes, and how they look."""

from __future__ import annotations

import gc
import os
import resource
import subprocess
import sys
import time
import warnings
from io import BytesIO
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from PIL import Image
from torch import nn

from bypass_fx import models
from bypass_fx.inspection import draw, inspect, write
from tests.browser import Page, browsing

from .results_file import RESULTS, ResultsFile

NAMES = (
    "timm:resnet18",
    "timm:vit_base_patch16_224",
    "timm:convnext_tiny",
    "timm:efficientnet_b0",
    "torchvision:fasterrcnn_resnet50_fpn",
    "torch.nn:Transformer",
    "timm:maxvit_base_tf_224",
)
COMMAND = "timm:vit_giant_patch14_224"
SHOT = "timm:vit_base_patch16_224"
# From the start of an action to the end of the frame that shows it.
_WAIT = """
const [action, done] = [arguments[0], arguments[1]];
const start = performance.now();
new Function(action)();
requestAnimationFrame(() => { const channel = new MessageChannel();
  channel.port1.onmessage = () => done(performance.now() - start); channel.port2.postMessage(0); });
"""
_SITE = "siteNodes.find((node) => node.site)"
INTERACTIONS = {
    "open a module": "{const closed = view.cy.nodes('.module.closed')[0]; view.toggle(closed.id());}",
    "close it": "view.toggle(view.cy.nodes('.module.open').last().id())",
    "show a site": f"go({_SITE}.id)",
    "the last site": "go(siteNodes[siteNodes.length - 1].id)",
    "after surgery": "setStage('after')",
    "before surgery": "setStage('before')",
    "search": "byId('search').value = 'norm'; search()",
    "zoom": "view.zoomBy(1.2)",
    "dark": "setTheme('dark')",
    "show sites": "openSites()",
    "collapse all": "closeAll()",
}


def model_named(name: str) -> tuple[nn.Module, Any]:
    """A model to look at, and example inputs where nothing else tells them."""
    if name == "torch.nn:Transformer":
        with warnings.catch_warnings(), torch.device("meta"):
            warnings.simplefilter("ignore")
            return nn.Transformer(), (torch.empty(10, 1, 512, device="meta"), torch.empty(10, 1, 512, device="meta"))
    return models.build_empty(name), None


def _thread_seconds(page: Page) -> float:
    """CPU time of the page's main thread so far."""
    metrics = page.driver.execute_cdp_cmd("Performance.getMetrics", {})["metrics"]
    return next(float(metric["value"]) for metric in metrics if metric["name"] == "TaskDuration")


def _interact(page: Page, action: str) -> tuple[float, float]:
    """Milliseconds of wall time, and of CPU time, that an interaction takes."""
    before = _thread_seconds(page)
    wall = page.driver.execute_async_script(_WAIT, action)
    return float(wall), 1000 * (_thread_seconds(page) - before)


def measure(name: str, page: Page, folder: Path) -> dict[str, Any]:
    """One page: written, opened, and every interaction done five times."""
    model, inputs = model_named(name)
    found = inspect(model, name, example_inputs=inputs)
    file = folder / "page.html"
    start = time.perf_counter()
    write(found, file)
    row: dict[str, Any] = {"model": name, "nodes": len(draw(found).nodes), "written": time.perf_counter() - start}
    row["kilobytes"] = file.stat().st_size // 1000
    page.driver.execute_cdp_cmd("Performance.enable", {"timeDomain": "threadTicks"})
    page.open(file)
    paints = "return performance.getEntriesByName('first-contentful-paint').map((entry) => entry.startTime)[0]"
    row["first_paint"] = page.js(paints)
    row["drawn"] = page.js("return window.drawnAfter")
    times: dict[str, list[tuple[float, float]]] = {}
    for _ in range(5):
        for interaction, action in INTERACTIONS.items():
            times.setdefault(interaction, []).append(_interact(page, action))
        page.js("setTheme('light')")
    for index, clock in enumerate(("milliseconds", "cpu_milliseconds")):
        medians = {name: round(median(one[index] for one in each), 1) for name, each in times.items()}
        row[clock] = medians | {"worst": round(max(one[index] for each in times.values() for one in each), 1)}
    row["load"] = round(os.getloadavg()[0], 1)
    row["complaints"] = len(page.complaints())
    return row


def command() -> dict[str, Any]:
    """`bypass-fx inspect` of a model of a billion parameters, as a process of its own: seconds, CPU seconds, memory."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "bypass_fx", "inspect", COMMAND], check=True, capture_output=True)
    wall = time.perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {
        "command": f"inspect {COMMAND}",
        "seconds": wall,
        "cpu_seconds": cpu,
        "megabytes": after.ru_maxrss // 1000,
        "load": round(os.getloadavg()[0], 1),
    }


def screenshots(folder: Path) -> None:
    """The page of one model with a site chosen, light, and after the surgery, dark; and six models on one sheet."""
    file = folder / "page.html"
    write(inspect(model_named(SHOT)[0], SHOT), file)
    for theme in ("light", "dark"):
        with browsing(1280, 860, dark=theme == "dark") as page:
            page.open(file)
            page.js(f"go({_SITE}.id)")
            if theme == "dark":
                page.js("setStage('after')")
            time.sleep(0.5)
            save(Image.open(BytesIO(page.driver.get_screenshot_as_png())), f"page-{theme}.png")
    tile = (560, 376)
    sheet = Image.new("RGB", (2 * tile[0], 3 * tile[1]))
    with browsing(1280, 860) as page:
        for index, name in enumerate(NAMES[:6]):
            model, inputs = model_named(name)
            write(inspect(model, name, example_inputs=inputs), file)
            page.open(file)
            time.sleep(0.5)
            shot = Image.open(BytesIO(page.driver.get_screenshot_as_png())).convert("RGB").resize(tile)
            sheet.paste(shot, (index % 2 * tile[0], index // 2 * tile[1]))
    save(sheet, "pages.png")


def save(image: Image.Image, name: str) -> None:
    """A screenshot beside the results, in so few colours that it stays small."""
    few = image.convert("RGB").quantize(256, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    few.save(RESULTS / name, optimize=True)


def run(pattern: str = "", results: str = "pages.jsonl") -> ResultsFile:
    """Measure every page that no earlier run has measured, and take the screenshots."""
    file = ResultsFile(results, ("torch", "timm", "torchvision", "selenium"))
    todo = [name for name in NAMES if pattern in name and name not in file.done("model")]
    with TemporaryDirectory() as place:
        folder = Path(place)
        if not file.done("command") - {None}:
            file.add(command())
        for name in todo:
            with browsing() as page, warnings.catch_warnings():
                warnings.simplefilter("ignore")
                version = page.driver.capabilities["browserVersion"]
                file.add({**measure(name, page, folder), "chromium": version})
            gc.collect()
        screenshots(folder)
    return file


def summary(file: ResultsFile) -> str:
    """The tables in Markdown."""
    lines = [
        "| model | nodes | page | first paint | drawn | slowest interaction | its CPU time | slowest CPU time | load |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in file:
        if "model" not in row:
            continue
        wall, cpu = (
            {k: v for k, v in row[clock].items() if k != "worst"} for clock in ("milliseconds", "cpu_milliseconds")
        )
        slowest, busiest = (max(each, key=each.__getitem__) for each in (wall, cpu))
        painted = f"{row['first_paint']:.0f} ms" if row["first_paint"] is not None else "not reported"
        lines.append(
            f"| {row['model']} | {row['nodes']} | {row['kilobytes']} kB | {painted} | {row['drawn']:.0f} ms | "
            f"{slowest}: {wall[slowest]:.0f} ms | {cpu[slowest]:.0f} ms | {busiest}: {cpu[busiest]:.0f} ms | {row['load']} |"
        )
    lines += [
        "",
        "An interaction lasts from its start to the end of the frame that shows it; medians of five. The CPU time is that of "
        "the page's main thread; the load is the machine's while it was measured, on 2 cores.",
        "",
    ]
    for row in file:
        if "command" in row:
            lines.append(
                f"`bypass-fx {row['command']}`: {row['seconds']:.1f} s ({row['cpu_seconds']:.1f} s of CPU time), "
                f"{row['megabytes']} MB at most, load {row['load']}."
            )
    return "\n".join(lines) + "\n"
