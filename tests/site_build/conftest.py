"""Small projects in temporary folders, built for real with either back end."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from site_build.engine import BuildFailed, Engine
from site_build.options import Options

MKDOCS_YML = """\
site_name: Test
docs_dir: site_src
strict: true
theme: {{name: material, font: false}}
plugins:
  - search
  - forward-pass: {options}
markdown_extensions:
  - attr_list
  - admonition
  - pymdownx.details
  - pymdownx.superfences
  - pymdownx.tabbed: {{alternate_style: true}}
"""
# Not in every project: it takes half a second to import.
JUPYTER = """\
  - mkdocs-jupyter: {include: ["**/*.ipynb"], ignore: ["carry/*.ipynb", "carry/*/*.ipynb"], execute: false}
"""
PAGE = """\
# A page

```python
from snippets.value import value
print("value", value())
assert value() > 0
```
"""


class Project:
    """A project to build; `pages` names the sources that the last build ran."""

    def __init__(self, root: Path, **options):
        self.root = root
        self.options = {"preload": [], "workers": 2} | options
        self.write("mkdocs.yml", MKDOCS_YML.format(options=json.dumps(self.options)))
        self.write("site_src/index.md", "# Home\n")
        self.write("snippets/__init__.py", "")
        self.write("snippets/value.py", "def value():\n    return 1\n")

    def write(self, path: str, text: str | bytes) -> Path:
        target = self.root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(text if isinstance(text, bytes) else text.encode())
        return target

    def edit(self, path: str, old: str, new: str) -> None:
        text = (self.root / path).read_text()
        assert old in text
        self.write(path, text.replace(old, new))

    def page(self, source: str, *cells: str, meta: str = "", info: str = "") -> None:
        fences = "\n\n".join(f"```python {info}\n{cell}\n```" for cell in cells)
        front = f"---\n{meta}\n---\n" if meta else ""
        self.write(f"site_src/{source}", f"{front}# Page\n\n{fences}\n")

    def build(self) -> dict:
        """Run the engine alone; the report."""
        Engine(
            self.root, self.root / "site_src", Options.of(self.options), log=lambda _: None
        ).build()
        return self.report()

    def problems(self) -> list[str]:
        """Of a build that must fail."""
        with pytest.raises(BuildFailed) as failed:
            self.build()
        return failed.value.problems

    def report(self) -> dict:
        return json.loads((self.root / "build/report.json").read_text())

    def about(self, source: str) -> dict:
        return next(p for p in self.report()["pages"] if p["source"] == source)

    def ran(self) -> list[str]:
        """Build, and tell which pages ran."""
        return [page["source"] for page in self.build()["pages"] if page["executed"]]

    def text(self, page: str) -> str:
        return (self.root / "build/pages" / page).read_text()

    def start(self, *command: str, **environment: str) -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, "-m", *command],
            cwd=self.root,
            env=os.environ | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def mkdocs(self, *arguments: str, **environment: str) -> tuple[int, str]:
        """The exit code and what was printed."""
        process = self.start("mkdocs", *arguments, **environment)
        output, _ = process.communicate(timeout=120)
        return process.returncode, output

    def site(self) -> dict[str, bytes]:
        folder = self.root / "site"
        return {
            path.relative_to(folder).as_posix(): path.read_bytes()
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }

    def copy(self, root: Path) -> "Project":
        shutil.copytree(self.root, root, ignore=shutil.ignore_patterns("build", "site"))
        return Project.__new__(Project)._at(root, self.options)

    def _at(self, root: Path, options: dict) -> "Project":
        self.root, self.options = root, options
        return self


def backends() -> list[str]:
    return ["fork", "kernel"] if sys.platform.startswith("linux") else ["kernel"]


@pytest.fixture(params=backends())
def project(request, tmp_path) -> Project:
    """On each back end."""
    return Project(tmp_path / "project", backend=request.param)


@pytest.fixture
def quick(tmp_path) -> Project:
    """On this machine's own back end, for what doesn't depend on it."""
    return Project(tmp_path / "project")
