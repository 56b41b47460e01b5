"""Runs pages in children forked from one process that has the big packages loaded (Linux).

The server is `python -m site_build.forkserver`, joined to its client by a socket. It has one
thread, since a fork copies no other, and imports third-party packages only, so that each
child sees the project as it is now.
"""

import contextlib
import ctypes
import gc
import importlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from concurrent.futures import Future
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path

from .recorder import THREADS

PR_SET_PDEATHSIG = 1
# Memory that a tensor gave back is kept for the next one, in huge pages: a training step has the
# kernel hand out and clear the same pages over and over. Saves a training page 7 % of its time.
MALLOC = {"hugetlb": 1, "mmap_threshold": 2**30, "trim_threshold": 2**32, "top_pad": 2**26}


def page_environment(scratch: Path, threads: int = 1) -> dict[str, str]:
    """The environment of a page's process: its threads, one hash seed, our figures.

    `scratch` stands in for the user's own IPython folder, whose settings are not ours.
    """
    here = Path(__file__).parent
    paths = filter(None, [str(here.parent), os.environ.get("PYTHONPATH")])
    return os.environ | dict.fromkeys(THREADS, str(threads)) | {
        "PYTHONHASHSEED": "0",
        "PYTHONPATH": os.pathsep.join(paths),
        "MPLBACKEND": "module://matplotlib_inline.backend_inline",
        "MATPLOTLIBRC": str(here / "matplotlibrc"),
        "IPYTHONDIR": str(scratch),
        "TOKENIZERS_PARALLELISM": "false",
        "TRITON_INTERPRET": "1",  # kernels come out the same where there is no GPU
        "HF_HUB_OFFLINE": "1",
        "GLIBC_TUNABLES": ":".join(f"glibc.malloc.{name}={n}" for name, n in MALLOC.items()),
    }  # fmt: skip


class ForkServer:
    """The client's side: `submit` a job, get a future of its result."""

    def __init__(self, workers: int, preload: list[str], scratch: Path):
        self.futures: dict[int, Future] = {}
        self.lock = threading.Lock()
        ours, theirs = socket.socketpair()
        command = ["-m", "site_build.forkserver", str(theirs.fileno()), str(workers), *preload]
        self.process = subprocess.Popen(
            [sys.executable, *command],
            stdin=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
            env=page_environment(scratch),
        )
        theirs.close()
        self.server = Connection(ours.detach())
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def submit(self, job: dict) -> Future:
        future = self.futures[job["id"]] = Future()
        self._send(job)
        if not self.reader.is_alive():
            self._give_up()
        return future

    def cancel(self, job: int) -> None:
        self._send({"cancel": job})

    def close(self) -> None:
        """End the server and its children, and wait until they are gone."""
        self._send(None)
        self.process.wait()
        self.reader.join()
        self.server.close()

    def _send(self, message: dict | None) -> None:
        with self.lock, contextlib.suppress(BrokenPipeError):  # `_read` tells of its end
            self.server.send(message)

    def _read(self) -> None:
        with contextlib.suppress(EOFError, ConnectionResetError):
            while True:
                result = self.server.recv()
                self.futures.pop(result["id"]).set_result(result)
        self._give_up()

    def _give_up(self) -> None:
        while self.futures:
            _, future = self.futures.popitem()
            future.set_result({"died": "the fork server has ended; see its message", "cell": 0})


class Child:
    """The server's side of one running page."""

    def __init__(self, job: dict):
        self.job, self.cell = job, 0
        self.deadline = time.monotonic() + job["timeout"]
        self.stderr = tempfile.TemporaryFile()  # noqa: SIM115
        self.channel, theirs = Pipe(duplex=False)
        self.pid = os.fork()
        if self.pid == 0:
            self._become(theirs)
        theirs.close()

    def _become(self, channel: Connection) -> None:
        """In the child: run the page, send the result, leave without any clean-up."""
        try:
            os.setsid()  # so that whatever the page starts ends with it
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            os.dup2(self.stderr.fileno(), 1)
            os.dup2(self.stderr.fileno(), 2)
            from .shell import run_page

            channel.send(run_page(self.job, lambda number: channel.send({"cell": number})))
            os._exit(0)
        except BaseException:
            traceback.print_exc(file=sys.__stderr__)
            os._exit(1)

    def end(self, result: dict | None = None, why: str | None = None) -> dict:
        """Reap the child and all that it started; its result, or why there is none."""
        if not result and not why:  # it has ended by itself: let it say how
            status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
            self.stderr.seek(0)
            said = self.stderr.read().decode(errors="replace").strip().splitlines()
            why = signal.Signals(-status).name if status < 0 else f"exit code {status}"
            why = ": ".join([f"its process ended with {why}", *said[-1:]])
        for kill in (os.kill, os.killpg):
            with contextlib.suppress(ProcessLookupError):
                kill(self.pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self.pid, 0)
        self.channel.close()
        self.stderr.close()
        return (result or {"died": why, "cell": self.cell}) | {"id": self.job["id"]}


class Server:
    def __init__(self, client: Connection, workers: int):
        self.client, self.workers = client, workers
        self.waiting: list[dict] = []
        self.running: dict[Connection, Child] = {}
        self.ended: list[tuple[Child, dict]] = []

    def run(self) -> None:
        try:
            while self.step():
                pass
        finally:
            for child in self.running.values():
                child.end(why="stopped")

    def step(self) -> bool:
        """Start what may start, then take in what has come; False at the end."""
        while self.waiting and len(self.running) < self.workers:
            child = Child(self.waiting.pop(0))
            self.running[child.channel] = child
        while self.ended:  # reaped only now: the next page runs meanwhile
            child, result = self.ended.pop()
            self.client.send(child.end(result))
        deadline = min((child.deadline for child in self.running.values()), default=None)
        timeout = None if deadline is None else max(0, deadline - time.monotonic())
        for ready in wait([self.client, *self.running], timeout):
            try:
                message = ready.recv()
            except EOFError:
                message = None
            if ready is not self.client:
                self.hear(self.running[ready], message)
            elif message is None:
                return False
            elif "cancel" in message:
                self.cancel(message["cancel"])
            else:
                self.waiting.append(message)
        for child in list(self.running.values()):
            if time.monotonic() >= child.deadline:
                self.stop(child, f"timeout: more than {child.job['timeout']:g} s")
        return True

    def hear(self, child: Child, message: dict | None) -> None:
        if message and "cell" in message:
            child.cell = message["cell"]
        else:
            del self.running[child.channel]
            self.ended.append((child, message))

    def cancel(self, number: int) -> None:
        for job in [job for job in self.waiting if job["id"] == number]:
            self.waiting.remove(job)
            self.client.send({"id": number, "died": "cancelled", "cell": 0})
        for child in [c for c in self.running.values() if c.job["id"] == number]:
            self.stop(child, "cancelled")

    def stop(self, child: Child, why: str) -> None:
        del self.running[child.channel]
        self.client.send(child.end(why=why))


def main(descriptor: str, workers: str, *preload: str) -> None:
    from . import recorder

    recorder.prepare()
    from .shell import make_shell, warm_figures

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the client, and so us
    shell = make_shell()
    for name in preload:
        importlib.import_module(name)
    if "matplotlib.pyplot" in sys.modules:
        warm_figures(shell)
    if (threads := len(os.listdir("/proc/self/task"))) > 1:
        sys.exit(f"fork server: {threads} threads after preloading {preload}; forks would hang")
    gc.collect()
    gc.freeze()  # else each child's collector visits, and so copies, all that was preloaded
    Server(Connection(int(descriptor)), int(workers)).run()
    os._exit(0)  # taking torch apart in order would take longer than a page


if __name__ == "__main__":
    main(*sys.argv[1:])
