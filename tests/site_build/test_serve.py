"""Plain `mkdocs serve`: pages at once, one rebuild an edit, errors on their page."""

import contextlib
import os
import random
import re
import socket
import subprocess
import sys
import time
import urllib.request

import pytest

from tests.site_build.conftest import Project, backends

GOOD = "from snippets.value import value\nprint('value', value())\nassert value() > 0"


def free_port() -> int:
    """Below those that the system gives to whoever asks: the kernels of other tests do."""
    while True:
        port = random.randrange(20_000, 30_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


class Server:
    def __init__(self, project):
        self.port = free_port()
        self.log = project.root / "serve.log"
        command = ["-u", "-m", "mkdocs", "serve", "-a", f"127.0.0.1:{self.port}"]
        self.process = subprocess.Popen(
            [sys.executable, *command], cwd=project.root, stdout=self.log.open("w"),
            stderr=subprocess.STDOUT, env=os.environ,
        )  # fmt: skip

    def get(self, path: str) -> str:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/{path}", timeout=5) as page:
                return page.read().decode()
        except OSError:  # not there yet
            return ""

    def wait_for(self, path: str, text: str, seconds: float = 30) -> str:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if text in (page := self.get(path)):
                return page
            time.sleep(0.1)
        raise AssertionError(f"no {text!r} at {path!r}:\n{self.log.read_text()}")

    def rebuilds(self) -> int:
        return len(re.findall("Building documentation", self.log.read_text()))


@pytest.fixture
def started():
    servers = []

    def start(project) -> Server:
        servers.append(Server(project))
        return servers[-1]

    yield start
    for server in servers:
        server.process.terminate()
        server.process.wait(timeout=20)


@pytest.fixture
def serve(project, started):
    return lambda: started(project)


def test_an_edited_cell_shows_after_exactly_one_rebuild(tmp_path, started):
    """On all back ends at once, since each has to be watched for a while."""
    servers = {}
    for backend in backends():
        project = Project(tmp_path / backend, backend=backend)
        project.page("a.md", GOOD)
        project.page("b.md", GOOD)
        project.build()
        servers[backend] = project, started(project)
    before = {}
    for backend, (project, server) in servers.items():
        server.wait_for("a/", "value 1")
        before[backend] = server.rebuilds()
        project.edit("site_src/a.md", "'value'", "'worth'")
    for _, server in servers.values():
        server.wait_for("a/", "worth 1")
    time.sleep(20)
    for backend, (_, server) in servers.items():
        assert server.rebuilds() == before[backend] + 1, backend
        assert server.log.read_text().count("executing 1 pages") == 1, backend


def test_pages_are_there_at_once_and_fill_in(project, serve):
    go = project.root / "go"
    wait = f"import os, time\nend = time.time() + 30\nwhile not os.path.exists('{go}') and time.time() < end: time.sleep(.05)\n"
    project.page("slow.md", wait + GOOD)
    project.page("prose.md")
    server = serve()
    page = server.wait_for("slow/", "Not executed yet")
    assert "value 1" not in page
    go.touch()
    assert "Not executed yet" not in server.wait_for("slow/", "value 1")


def test_a_long_preparation_keeps_no_page_waiting(project, serve):
    go = project.root / "go"
    project.write(
        "making.py",
        f"import os, time\n\ndef prepare(root):\n    end = time.time() + 30\n"
        f"    while not os.path.exists('{go}') and time.time() < end: time.sleep(.05)\n"
        f"    (root / 'build/made.txt').write_text('41')\n",
    )
    project.page("a.md", "print('made', open('build/made.txt').read())\nassert 1 + len('a') == 2")
    project.edit("mkdocs.yml", '"preload": []', '"preload": [], "prepare": ["making"]')
    server = serve()
    server.wait_for("a/", "Not executed yet")
    go.touch()
    assert "Not executed yet" not in server.wait_for("a/", "made 41")


def test_a_run_that_ends_before_mkdocs_watches_still_shows(project, serve):
    project.page("a.md", GOOD)
    late = "import time\n\ndef on_serve(server, **kwargs):\n    time.sleep(4)\n    return server\n"
    project.write("late.py", late)
    project.edit("mkdocs.yml", "docs_dir", "hooks: [late.py]\ndocs_dir")
    assert "value 1" in serve().wait_for("a/", "value 1")


def test_a_failing_cell_shows_its_error_and_serving_goes_on(project, serve):
    project.page("a.md", GOOD)
    project.page("b.md", GOOD)
    server = serve()
    server.wait_for("a/", "value 1")
    project.page("a.md", GOOD, "1 / 0")
    page = server.wait_for("a/", "ZeroDivisionError: division by zero")
    assert "value 1" in page and "This cell failed" in page
    server.wait_for("b/", "value 1")
    project.page("a.md", GOOD, "print('mended')")
    server.wait_for("a/", "mended")


def test_an_edited_module_or_data_file_shows(project, serve):
    project.write("data/number.txt", "17")
    project.page("a.md", GOOD + "\nprint('data', open('data/number.txt').read())")
    server = serve()
    server.wait_for("a/", "data 17")
    project.edit("snippets/value.py", "1", "2")
    server.wait_for("a/", "value 2")
    project.write("data/number.txt", "18")
    server.wait_for("a/", "data 18")


def test_a_long_text_that_ipython_took_for_a_file_name(project, serve):
    shown = "from IPython.display import Markdown, display\ndisplay(Markdown('| a |\\n|---|' * 50))"
    project.page("a.md", f"{shown}\n{GOOD}")
    project.build()
    serve().wait_for("a/", "value 1")


def test_a_build_beside_a_serve(project, serve):
    project.page("a.md", GOOD)
    server = serve()
    server.wait_for("a/", "value 1")
    project.page("a.md", GOOD, "1 / 0")
    server.wait_for("a/", "ZeroDivisionError")
    code, output = project.mkdocs("build")
    assert code == 1 and "ZeroDivisionError" in output
    project.page("a.md", GOOD, "print('fine')")
    assert project.mkdocs("build")[0] == 0
    assert b"fine" in project.site()["a/index.html"]
    server.wait_for("a/", "fine")
