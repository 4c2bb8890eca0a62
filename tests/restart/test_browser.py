"""The quickstart in a real JupyterLab and a real browser, as a person goes through it: run, restart from the menu, run again.

Screenshots are kept (``build/artifacts``).
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import nbformat
import pytest
from playwright.sync_api import Locator, Page, expect, sync_playwright

from tests.support.kernels import REPOSITORY
from tests.support.lab import artifacts, chromium, jupyter_lab
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
        expect(lab.output(SECOND_LOAD)).to_contain_text("(cached)", timeout=PATIENCE_MS)
        assert zygote().kernels == 1  # the restarted one was forked
        lab.run(EMBEDDING_AGAIN)
        expect(lab.output(EMBEDDING_AGAIN)).to_contain_text("tensor(", timeout=PATIENCE_MS)
        assert lab.output(EMBEDDING_AGAIN).inner_text().partition("tensor")[2] == numbers.partition("tensor")[2]
        lab.run(TABLE)
        expect(lab.cell(TABLE)).to_contain_text("[3]:", timeout=PATIENCE_MS)
        expect(lab.output(TABLE)).to_contain_text("quickstart_embedding", timeout=PATIENCE_MS)
        lab.screenshot("after-the-restart")
        lab.picture("restart", TABLE, EMBEDDING_AGAIN)
