"""Runs pages in children forked from one process that has the big packages loaded (Linux).

The server is `python -m site_build.forkserver`: jobs come in as JSON lines on its standard
input and results leave on its standard output. It has one thread, since a fork copies no
other. It imports third-party packages only, so that each child sees the project as it is.
"""

import contextlib
import ctypes
import importlib
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import Future
from pathlib import Path

from .recorder import THREADS

PR_SET_PDEATHSIG = 1


def page_environment(scratch: Path, threads: int = 1) -> dict[str, str]:
    """The environment of a page's process: its threads, one hash seed, our figures.

    `scratch` stands in for the user's own IPython folder, whose settings are not ours.
    """
    here = Path(__file__).parent
    return (
        os.environ
        | dict.fromkeys(THREADS, str(threads))
        | {
            "PYTHONHASHSEED": "0",
            "PYTHONPATH": os.pathsep.join(
                filter(None, [str(here.parent), os.environ.get("PYTHONPATH")])
            ),
            "MPLBACKEND": "module://matplotlib_inline.backend_inline",
            "MATPLOTLIBRC": str(here / "matplotlibrc"),
            "IPYTHONDIR": str(scratch),
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
        }
    )


class ForkServer:
    """The client's side: `submit` a job, get a future of its result."""

    def __init__(self, workers: int, preload: list[str], scratch: Path):
        self.futures: dict[int, Future] = {}
        self.lock = threading.Lock()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "site_build.forkserver", str(workers), *preload],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=page_environment(scratch),
        )
        threading.Thread(target=self._read, daemon=True).start()

    def submit(self, job: dict) -> Future:
        future = self.futures[job["id"]] = Future()
        self._send(job)
        return future

    def cancel(self, job: int) -> None:
        self._send({"cancel": job})

    def close(self) -> None:
        """End the server and its children, and wait until they are gone."""
        self.process.stdin.close()
        self.process.wait()

    def _send(self, message: dict) -> None:
        with self.lock:
            self.process.stdin.write(json.dumps(message).encode() + b"\n")
            self.process.stdin.flush()

    def _read(self) -> None:
        for line in self.process.stdout:
            result = json.loads(line)
            self.futures.pop(result["id"]).set_result(result)
        for future in self.futures.values():
            future.set_result({"died": "the fork server ended", "cell": 0})


class Child:
    """The server's side of one running page."""

    def __init__(self, job: dict):
        self.job, self.cell, self.result = job, 0, None
        self.deadline = time.monotonic() + job["timeout"]
        self.buffer = bytearray()
        self.stderr = tempfile.TemporaryFile()  # noqa: SIM115
        self.channel, theirs = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            self._become(theirs)
        os.close(theirs)
        os.set_blocking(self.channel, False)

    def _become(self, channel: int) -> None:
        """In the child: run the page, send the result, leave without any clean-up."""
        status = 1
        try:
            os.setsid()  # so that whatever the page starts ends with it
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            null = os.open(os.devnull, os.O_RDWR)
            os.dup2(null, 0)
            os.dup2(self.stderr.fileno(), 1)
            os.dup2(self.stderr.fileno(), 2)
            from .shell import Shell, run_page

            def send(message: dict) -> None:
                data = json.dumps(message).encode() + b"\n"
                while data:
                    data = data[os.write(channel, data) :]

            send(run_page(self.job, Shell.instance(), lambda number: send({"cell": number})))
            status = 0
        except BaseException:
            import traceback

            traceback.print_exc(file=sys.__stderr__)
        finally:
            os._exit(status)

    def read(self) -> bool:
        """Take in what has come; False at the end."""
        chunk = os.read(self.channel, 1 << 20)
        self.buffer += chunk
        *lines, self.buffer = self.buffer.split(b"\n") if b"\n" in chunk else [self.buffer]
        for line in lines:
            message = json.loads(line)
            self.cell = message.get("cell", self.cell)
            self.result = message if "record" in message else None
        return bool(chunk) and self.result is None

    def end(self, why: str | None = None) -> dict:
        """Reap the child and all that it started; its result, or why there is none."""
        status = None
        if not why and self.result is None:  # it is on its way out: let it say how
            status = os.waitpid(self.pid, 0)[1]
        for kill, target in ((os.kill, self.pid), (os.killpg, self.pid)):
            with contextlib.suppress(ProcessLookupError):
                kill(target, signal.SIGKILL)
        if status is None:
            status = os.waitpid(self.pid, 0)[1]
        status = os.waitstatus_to_exitcode(status)
        os.close(self.channel)
        self.stderr.seek(0)
        said = self.stderr.read().decode(errors="replace").strip().splitlines()
        self.stderr.close()
        if self.result and not why:
            return self.result | {"id": self.job["id"]}
        if not why:
            why = signal.Signals(-status).name if status < 0 else f"exit code {status}"
            why = f"its process ended with {why}" + (f": {said[-1]}" if said else "")
        return {"id": self.job["id"], "died": why, "cell": self.cell}


class Server:
    def __init__(self, workers: int):
        self.workers = workers
        self.waiting: list[dict] = []
        self.running: dict[int, Child] = {}
        self.selector = selectors.DefaultSelector()
        self.selector.register(0, selectors.EVENT_READ)
        self.results = os.dup(1)  # nothing that a package prints gets among the results
        os.dup2(2, 1)
        self.buffer = b""

    def run(self) -> None:
        try:
            while self._step():
                pass
        finally:
            for child in self.running.values():
                child.end("stopped")

    def _step(self) -> bool:
        while self.waiting and len(self.running) < self.workers:
            child = Child(self.waiting.pop(0))
            self.running[child.channel] = child
            self.selector.register(child.channel, selectors.EVENT_READ)
        nearest = min((c.deadline for c in self.running.values()), default=None)
        timeout = None if nearest is None else max(0, nearest - time.monotonic())
        for key, _ in self.selector.select(timeout):
            if key.fd == 0:
                if not self._receive():
                    return False
            elif key.fd in self.running and not self.running[key.fd].read():
                self._finish(self.running[key.fd])
        for child in list(self.running.values()):
            if time.monotonic() >= child.deadline:
                self._finish(child, f"timeout: more than {child.job['timeout']:g} s")
        return True

    def _receive(self) -> bool:
        data = os.read(0, 1 << 20)
        *lines, self.buffer = (self.buffer + data).split(b"\n")
        for message in map(json.loads, lines):
            if "cancel" in message:
                self._cancel(message["cancel"])
            else:
                self.waiting.append(message)
        return bool(data)

    def _cancel(self, number: int) -> None:
        for job in [job for job in self.waiting if job["id"] == number]:
            self.waiting.remove(job)
            self._send({"id": number, "died": "cancelled", "cell": 0})
        for child in [c for c in self.running.values() if c.job["id"] == number]:
            self._finish(child, "cancelled")

    def _finish(self, child: Child, why: str | None = None) -> None:
        self.selector.unregister(child.channel)
        del self.running[child.channel]
        self._send(child.end(why))

    def _send(self, message: dict) -> None:
        data = json.dumps(message).encode() + b"\n"
        while data:
            data = data[os.write(self.results, data) :]


def main() -> None:
    from . import recorder

    recorder.prepare()
    from .shell import make_shell

    workers, *preload = sys.argv[1:]
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the client, and so us
    server = Server(int(workers))
    shell = make_shell()
    recorder.set_figure_format(shell)
    for name in preload:
        importlib.import_module(name)
    if "matplotlib.pyplot" in sys.modules:
        warm_figures(shell)
    threads = len(os.listdir("/proc/self/task"))
    if threads != 1:
        sys.exit(f"fork server: {threads} threads after preloading {preload}; forks would hang")
    server.run()


def warm_figures(shell) -> None:
    """Draw once, so that no child pays for the first figure."""
    from IPython.core.pylabtools import print_figure
    from matplotlib import pyplot

    shell.run_line_magic("matplotlib", "inline")
    figure, axes = pyplot.subplots()
    axes.plot([0, 1], label="$x$")
    axes.legend()
    print_figure(figure, bbox_inches=None)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
