"""README.md as a test: its blocks run, in order, in a real shell and a real kernel; what it names exists."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from nbcache.cli import app
from nbcache.guide.topics import names
from tests.support.kernels import Kernel, RemoteError

REPOSITORY = Path(__file__).resolve().parents[1]
README = REPOSITORY / "README.md"
PLACEHOLDERS = "import torch\nclass MyModel(torch.nn.Linear):\n    def __init__(self):\n        super().__init__(64, 8)"
"""What a reader has, and the README does not define."""


class ReadmeError(AssertionError):
    """Something that the README shows does not work."""


@dataclass(frozen=True)
class Block:
    """One fenced block, and the line it starts at."""

    language: str
    source: str
    line: int


def blocks_of(text: str) -> list[Block]:
    found = re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [Block(match[1], match[2], text.count("\n", 0, match.start()) + 1) for match in found]


def run_shell_line(line: str, folder: Path) -> None:
    """Run one line of a shell block; installing, making and testing are only looked into. ``.venv`` is this environment."""
    program, *arguments = line.split()
    if program == "make":
        run(["make", "--no-print-directory", "--dry-run", "--always-make", *arguments], line, REPOSITORY)
    elif program == "pip":
        options = ["--dry-run", "--no-deps", "--no-index", "--no-build-isolation", "--quiet"]
        run([sys.executable, "-m", "pip", *arguments, *options], line, REPOSITORY)
    elif program == ".venv/bin/python" and arguments[:2] == ["-m", "pytest"]:
        run([sys.executable, *arguments, "--collect-only"], line, REPOSITORY)
    elif program in ("nbcache", ".venv/bin/nbcache"):
        run([sys.executable, "-m", "nbcache", *arguments], line, folder)
    else:
        raise ReadmeError(f"{line}: a program that this test does not know")


def run(command: list[str], line: str, folder: Path) -> None:
    done = subprocess.run(command, cwd=folder, env=os.environ, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ReadmeError(f"{line}: exit {done.returncode}: {done.stderr}")


def check(text: str, folder: Path) -> list[Block]:
    """Run every block of a README, in order, the kernel restarted after each. ReadmeError for the first that fails."""
    save_file({"weight": torch.randn(8, 64), "bias": torch.zeros(8)}, folder / "model.safetensors")
    with Kernel("python3") as kernel:
        blocks = blocks_of(text)
        for block in blocks:
            check_block(block, kernel, folder)
    return blocks


def check_block(block: Block, kernel: Kernel, folder: Path) -> None:
    if block.language == "sh":
        for line in block.source.splitlines():
            if line.strip() and not line.startswith("#"):
                run_shell_line(line, folder)
    elif block.language in ("python", "ipython"):
        kernel.run(f"%cd -q {folder}\n{PLACEHOLDERS}")
        try:
            kernel.run(block.source)
        except RemoteError as error:
            raise ReadmeError(f"README line {block.line}: {error}") from error
        kernel.restart()  # each block stands alone, and finds what an earlier one kept
    elif block.language != "text":
        raise ReadmeError(f"README line {block.line}: a block of {block.language!r}, which this test cannot check")


def pages() -> str:
    """The written pages of ``nbcache help``."""
    return "\n\n".join(path.read_text() for path in sorted((REPOSITORY / "nbcache" / "guide").glob("*.md")))


def test_every_block_of_help_works(runtime_dir, tmp_path):
    assert {block.language for block in check(pages(), tmp_path)} == {"text", "ipython"}


def test_every_block_works(runtime_dir, tmp_path):
    assert {block.language for block in check(README.read_text(), tmp_path)} == {"text", "sh", "ipython", "python"}


@pytest.mark.parametrize(
    "block",
    [
        "```sh\nmake coffee\n```",
        "```sh\nnbcache brew\n```",
        "```sh\nnbcache load missing.safetensors\n```",
        "```sh\nnbcached status\n```",
        "```sh\nnbcache help coffee\n```",
        "```sh\n.venv/bin/python -m pytest tests/coffee\n```",
        "```sh\npip install ./nowhere\n```",
        "```ipython\n%load_ext nbcache\n%brew_weights\n```",
        "```ipython\n%load_ext nbcache\n%load_weights model.safetensors --milk\n```",
        "```python\nimport nbcache\nnbcache.brew()\n```",
        "```\nnbcache status\n```",
    ],
)
def test_what_does_not_exist_is_noticed(runtime_dir, tmp_path, block):
    with pytest.raises(ReadmeError):
        check(f"# A README\n\n{block}\n", tmp_path)


@pytest.mark.parametrize("read", [README.read_text, pages], ids=["README", "help"])
def test_commands_and_magics_in_the_text_exist(read):
    text = re.sub(r"^```.*?^```$", "", read(), flags=re.MULTILINE | re.DOTALL)
    commands = {command.name or command.callback.__name__ for command in app.registered_commands}
    commands |= {group.name for group in app.registered_groups}
    named = set(re.findall(r"`nbcache (\w+)", text))
    assert named
    assert named <= commands
    topics = set(re.findall(r"`nbcache help (\w+)`", text))
    assert topics
    assert topics <= set(names())
    assert set(re.findall(r"`%(\w+)", text)) <= {
        "config", "load_ext", "load_lora", "load_weights", "nbcache", "save_weights", "unload_lora", "weights",
    }  # fmt: skip
    targets = set(re.findall(r"^(\w+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"`make (\w+)", text)) <= targets


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#:]+)\)", README.read_text()):
        assert (REPOSITORY / target).exists(), target
