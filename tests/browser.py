"""Chromium for the tests: finds it, starts it, and notes what goes wrong in its pages.

`python -m tests.browser` installs it where it is missing.
"""

import contextlib
import functools
import gzip
import http.server
import io
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--no-first-run",
]


def executable() -> str | None:
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if path := shutil.which(name):
            return path
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        path = playwright.chromium.executable_path
    return path if Path(path).exists() else None


@contextlib.contextmanager
def chromium():
    from playwright.sync_api import sync_playwright

    path = executable()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()


def watched(context, base: str):
    """A tab, and the list in which its errors, refusals and foreign requests gather."""
    tab, troubles = context.new_page(), []

    def note(what):
        troubles.append(f"{tab.url.removeprefix(base)}: {what}")

    tab.add_init_script(
        "addEventListener('securitypolicyviolation',"
        " e => console.error('refused by policy', e.violatedDirective, e.blockedURI))"
    )
    tab.on("console", lambda m: m.type in ("error", "warning") and note(m.text))
    tab.on("pageerror", lambda error: note(str(error)))
    tab.on("request", lambda r: r.url.startswith((base, "data:")) or note(f"asks {r.url}"))
    # What a page was still loading when it was left is aborted, and no failure.
    tab.on(
        "requestfailed",
        lambda r: r.failure == "net::ERR_ABORTED" or note(f"failed: {r.url}, {r.failure}"),
    )
    tab.on("response", lambda r: r.status >= 400 and note(f"{r.status}: {r.url}"))
    return tab, troubles


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args): ...

    def end_headers(self):
        # Else linkchecker waits a third of a second before each request, to be polite.
        self.send_header("LinkChecker", "allowed")
        super().end_headers()


class Zipped(Quiet):
    """As real servers send texts."""

    def send_head(self):
        path = Path(self.translate_path(self.path))
        path = path / "index.html" if path.is_dir() else path
        if path.suffix not in (".html", ".css", ".js", ".json", ".svg") or not path.is_file():
            return super().send_head()
        data = zipped(path)
        self.send_response(200)
        self.send_header("Content-Type", self.guess_type(str(path)))
        self.send_header("Content-Encoding", "gzip")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        return io.BytesIO(data)


@functools.cache
def zipped(path: Path) -> bytes:
    return gzip.compress(path.read_bytes(), 6)


@contextlib.contextmanager
def served(folder: Path, kind: type = Quiet):
    """The folder's address on a local server."""
    handler = functools.partial(kind, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


def install() -> None:
    """Debian's package where we may install it, else Playwright's own build."""
    if shutil.which("apt-get") and os.geteuid() == 0:
        subprocess.run(["apt-get", "update", "-qq"], check=False)
        packages = ["chromium", "fonts-dejavu-core"]
        command = ["apt-get", "install", "-y", "-qq", "--no-install-recommends", *packages]
        subprocess.run(command, check=False)
    else:
        subprocess.run([sys.executable, "-m", "playwright", "install", "chromium"], check=False)


if __name__ == "__main__":
    if not executable():
        install()
    if not executable():
        sys.exit(
            "The tests need Chromium, and it could not be installed. Install the package "
            "`chromium` of your system, or run `python -m playwright install chromium`."
        )
