"""The site's own configuration with other pages: what stands in mkdocs.yml is tested."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


class Shell:
    """A project of a few pages, in the theme as it is configured."""

    def __init__(self, root: Path):
        self.root = root
        self.site = root / "site"
        config = (ROOT / "mkdocs.yml").read_text("utf-8")
        config = re.sub(r"^nav:\n(  .*\n)+", "", config, flags=re.MULTILINE)
        # Their words are about something else; test_addresses.py has this hook.
        config = config.replace("  - theme/descriptions.py\n", "")
        # It imports modules, and these projects have others; test_calculators.py has this hook.
        config = config.replace("  - theme/calculators.py\n", "")
        # These pages need nothing loaded or made before.
        config = re.sub(r"(  - forward-pass:\n)( {6}.*\n)+", r"\1      workers: 1\n", config)
        (root / "mkdocs.yml").write_text(config)
        (root / "theme").symlink_to(ROOT / "theme")
        (root / "site_src/reference").mkdir(parents=True)
        shutil.copytree(ROOT / "site_src/assets", root / "site_src/assets")
        self.page("index.md", "# Start\n\nA page.")
        self.page("reference/tags.md", "# Families\n\n<!-- material/tags -->")

    def page(self, name: str, text: str):
        path = self.root / "site_src" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")

    def edit(self, name: str, old: str, new: str):
        text = (self.root / name).read_text("utf-8")
        assert text.count(old) == 1, f"{old!r} stands {text.count(old)} times in {name}"
        (self.root / name).write_text(text.replace(old, new))

    def build(self, **environment: str) -> tuple[int, str]:
        done = subprocess.run(
            [sys.executable, "-m", "mkdocs", "build", "--strict"], cwd=self.root, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False,
            env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        )  # fmt: skip
        return done.returncode, done.stdout

    def html(self, name: str) -> str:
        return (self.site / name).read_text("utf-8")


@pytest.fixture
def shell(tmp_path) -> Shell:
    return Shell(tmp_path)
