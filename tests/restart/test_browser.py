"""The quickstart in a real JupyterLab and a real browser, as a person goes through it: run, restart from the menu, run again.

Screenshots are kept (``build/artifacts``).
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import nbformat
import pytest
import torch
from playwright.sync_api import Locator, Page, expect, sync_playwright
from safetensors.torch import save_file

import nbcache
from nbcache.jupyter.kernelspec import DISPLAY_NAME
from tests.support.kernels import REPOSITORY
from tests.support.lab import artifacts, chromium, jupyter_lab
from tests.support.waiting import eventually
from tests.support.zygotes import zygote

PATIENCE_MS = 60_000
FIRST_LOAD, EMBEDDING, TABLE, SECOND_LOAD, EMBEDDING_AGAIN = 3, 6, 11, 13, 14
"""Cells of the quickstart, by place."""


@pytest.fixture
def page():
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox", "--disable-gpu"])
        try:
            page = browser.new_page(viewport={"width": 1100, "height": 2000})
            page.set_default_timeout(PATIENCE_MS)
            yield page
        finally:
            page.screenshot(path=str(artifacts() / "in-the-end.png"))
            browser.close()


class Lab:
    """JupyterLab's page with a notebook open."""

    def __init__(self, page: Page) -> None:
        self.page = page

    def cell(self, number: int) -> Locator:
        return self.page.locator(".jp-Notebook .jp-Cell").nth(number)

    def output(self, number: int) -> Locator:
        return self.cell(number).locator(".jp-OutputArea")

    def select(self, number: int) -> None:
        self.cell(number).locator(".jp-InputPrompt").click()

    def choose(self, menu: str, entry: str) -> None:
        self.page.locator(".lm-MenuBar-item", has_text=re.compile(f"^{menu}$")).click()
        self.page.locator(".lm-Menu-item", has_text=re.compile(f"^{entry}")).first.click()

    def wait_until_idle(self) -> None:
        """Until the kernel answers: the notebook's own indicator says idle before there is one, too."""
        expect(self.page.get_by_text(f"{DISPLAY_NAME} | Idle")).to_be_visible(timeout=PATIENCE_MS)
        expect(self.page.locator('.jp-Notebook-ExecutionIndicator[data-status="idle"]')).to_be_visible(timeout=PATIENCE_MS)

    def restart(self) -> None:
        self.choose("Kernel", "Restart Kernel…")
        self.page.locator(".jp-Dialog .jp-mod-accept").click()

    def run(self, number: int) -> None:
        """Run a cell, as Shift+Enter does."""
        self.select(number)
        self.page.keyboard.press("Shift+Enter")

    def screenshot(self, name: str) -> None:
        self.page.screenshot(path=str(artifacts() / f"{name}.png"))

    def picture(self, name: str, first: int, last: int) -> None:
        """Some of the cells alone, for the README."""
        top, bottom = self.cell(first).bounding_box(), self.cell(last).bounding_box()
        assert top is not None
        assert bottom is not None
        height = bottom["y"] + bottom["height"] - top["y"]
        clip = {"x": top["x"], "y": top["y"], "width": top["width"], "height": height}
        self.page.screenshot(path=str(artifacts() / f"{name}.png"), clip=clip)


def prepare(folder: Path, specs: Path) -> dict[str, str]:
    """The notebooks without outputs, and an environment in which JupyterLab has our kernel and asks nothing."""
    shutil.copytree(REPOSITORY / "notebooks", folder / "notebooks")
    quickstart = folder / "notebooks" / "quickstart.ipynb"
    document = nbformat.read(quickstart, as_version=4)
    for cell in document.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    nbformat.write(document, quickstart)
    shutil.copytree(specs / "nbcache", folder / "jupyter" / "kernels" / "nbcache")
    settings = folder / "settings" / "@jupyterlab" / "apputils-extension"
    settings.mkdir(parents=True)
    (settings / "notification.jupyterlab-settings").write_text('{"fetchNews": "false", "checkForUpdates": false}')
    return {
        "JUPYTER_PATH": str(folder / "jupyter"),
        "JUPYTER_CONFIG_DIR": str(folder / "config"),
        "JUPYTERLAB_SETTINGS_DIR": str(folder / "settings"),
        "JUPYTERLAB_WORKSPACES_DIR": str(folder / "workspaces"),
        "IPYTHONDIR": str(folder / "ipython"),
    }


@pytest.mark.timeout(300)
def test_the_quickstart_with_a_restart_from_the_menu(warm, specs, page, tmp_path):
    with jupyter_lab(tmp_path / "notebooks", **prepare(tmp_path, specs)) as address:
        lab = Lab(page)
        page.goto(address.format("quickstart.ipynb"))
        expect(lab.cell(SECOND_LOAD)).to_be_visible(timeout=PATIENCE_MS)
        lab.wait_until_idle()
        lab.select(SECOND_LOAD)
        lab.choose("Run", "Run All Above Selected Cell")
        expect(lab.output(FIRST_LOAD)).to_contain_text("(read from disk)", timeout=PATIENCE_MS)
        expect(lab.output(TABLE)).to_contain_text("quickstart_embedding", timeout=PATIENCE_MS)
        numbers = lab.output(EMBEDDING).inner_text()
        assert "tensor(" in numbers
        lab.screenshot("before-the-restart")

        lab.restart()
        lab.run(SECOND_LOAD)
        expect(lab.output(SECOND_LOAD)).to_contain_text("(cached, 0 B private)", timeout=PATIENCE_MS)
        eventually(lambda: zygote().kernels == 1)  # the restarted one was forked
        lab.run(EMBEDDING_AGAIN)
        expect(lab.output(EMBEDDING_AGAIN)).to_contain_text("tensor(", timeout=PATIENCE_MS)
        assert lab.output(EMBEDDING_AGAIN).inner_text().partition("tensor")[2] == numbers.partition("tensor")[2]
        lab.run(TABLE)
        expect(lab.cell(TABLE)).to_contain_text("[3]:", timeout=PATIENCE_MS)
        expect(lab.output(TABLE)).to_contain_text("quickstart_embedding", timeout=PATIENCE_MS)
        lab.screenshot("after-the-restart")
        lab.picture("restart", TABLE, EMBEDDING_AGAIN)


def write_notebook(path: Path, *cells: str) -> None:
    document = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    document.metadata["kernelspec"] = {"name": "nbcache", "display_name": DISPLAY_NAME, "language": "python"}
    nbformat.write(document, path)


LOAD, PANEL, TO_COMPLETE = 0, 1, 2


@pytest.mark.timeout(300)
def test_the_panel_and_completion(warm, specs, page, tmp_path):
    """What %weights shows: bars, a row that opens to its tensors, a filter that works, on both themes. And Tab."""
    path = tmp_path / "encoder.safetensors"
    save_file({f"encoder.layer.{number}.weight": torch.ones(64, 64) for number in range(24)}, path)
    names = ("probe-cats", "probe-dogs")
    for name in names:
        nbcache.put(name, torch.ones(4, 4)).release()
    environment = prepare(tmp_path, specs)
    cells = (f"w = %load_weights {path} --device cpu", "%weights", "%load_weights pro")
    write_notebook(tmp_path / "notebooks" / "everyday.ipynb", *cells)
    with jupyter_lab(tmp_path / "notebooks", **environment) as address:
        lab = Lab(page)
        page.goto(address.format("everyday.ipynb"))
        expect(lab.cell(TO_COMPLETE)).to_be_visible(timeout=PATIENCE_MS)
        lab.wait_until_idle()
        lab.run(LOAD)
        lab.run(PANEL)
        panel = lab.output(PANEL).locator(".nbcache")
        expect(panel).to_contain_text("encoder.safetensors", timeout=PATIENCE_MS)
        expect(panel).to_contain_text("everyday.ipynb")
        assert panel.locator(".bar").first.bounding_box()["width"] > 100
        row = panel.locator("details", has_text="encoder.layer.23.weight")
        expect(row.locator("td code").first).to_be_hidden()
        row.locator("summary").click()
        expect(row.locator("td code").first).to_be_visible()
        lab.picture("panel-light", PANEL, PANEL)
        styles = "node => [getComputedStyle(node).textAlign, getComputedStyle(node).backgroundColor]"
        assert row.locator("td code").first.evaluate(styles) == ["left", "rgba(0, 0, 0, 0)"]  # not as JupyterLab has tables
        assert row.locator("tbody td.n").first.evaluate(styles)[0] == "right"
        row.locator("input").fill("layer.1")
        expect(row.locator("tbody tr:visible")).to_have_count(11)  # 1, and 10 to 19
        row.locator("input").fill("layer.23")
        expect(row.locator("tbody tr:visible")).to_have_count(1)
        page.evaluate("window.jupyterapp.commands.execute('apputils:change-theme', {theme: 'JupyterLab Dark'})")
        expect(page.locator('body[data-jp-theme-light="false"]')).to_have_count(1)
        lab.picture("panel-dark", PANEL, PANEL)

        lab.cell(TO_COMPLETE).locator(".cm-content").click()
        page.keyboard.press("End")
        page.keyboard.press("Tab")
        offered = page.locator(".jp-Completer:not(.lm-mod-hidden) .jp-Completer-item")
        expect(offered).to_have_count(len(names), timeout=PATIENCE_MS)
        for name in names:
            expect(offered.filter(has_text=name)).to_be_visible()
        lab.screenshot("completion")
        page.keyboard.press("Enter")
        expect(lab.cell(TO_COMPLETE).locator(".cm-content")).to_have_text(f"%load_weights {names[0]}")
    for name in names:
        nbcache.evict(name)
