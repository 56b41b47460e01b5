"""Runs each page in a Jupyter kernel of its own, through nbclient (any platform)."""

import ast
import asyncio
import contextlib
import json
import logging
import os
import subprocess
import tempfile
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError
from traitlets.config import Config

from .forkserver import page_environment
from .recorder import last_line

SILENT = logging.getLogger("site_build.kernels")  # nbclient's own lines: the engine says more
SILENT.setLevel(logging.CRITICAL)

START = """\
from site_build import recorder as _recorder
_recorder.prepare()
_recorder.end_with_stdin()
get_ipython()._recorder = _recorder.start(**__import__("json").loads({!r}))
del _recorder"""
FINISH = "__import__('json').dumps(get_ipython()._recorder.finish())"


class Kernels:
    """The same interface as the fork server's: `submit`, `cancel`, `close`."""

    def __init__(self, workers: int, scratch: Path):
        self.scratch = scratch
        self.pool = ThreadPoolExecutor(workers)
        self.cancelled: dict[int, threading.Event] = {}

    def submit(self, job: dict) -> Future:
        self.cancelled[job["id"]] = threading.Event()
        return self.pool.submit(self._run, job, self.cancelled[job["id"]])

    def cancel(self, job: int) -> None:
        self.cancelled[job].set()

    def close(self) -> None:
        for event in self.cancelled.values():
            event.set()
        self.pool.shutdown(cancel_futures=True)

    def _run(self, job: dict, cancelled: threading.Event) -> dict:
        about = {key: job[key] for key in ("page", "root", "ignore", "threads")}
        codes = [START.format(json.dumps(about)), *job["cells"], FINISH]
        cells = [nbformat.v4.new_code_cell(code) for code in codes]
        deadline = time.monotonic() + job["timeout"]
        # Sockets in a folder: of TCP ports, which jupyter_client picks before it starts the
        # kernel, two kernels can get the same. The folder's path is short, as sockets want.
        with tempfile.TemporaryDirectory(prefix="fp-") as sockets:
            kernel = {"transport": "ipc", "connection_file": f"{sockets}/kernel.json"}
            client = NotebookClient(
                nbformat.v4.new_notebook(cells=cells),
                kernel_name="python3",
                timeout_func=lambda _: max(0.01, deadline - time.monotonic()),
                shutdown_kernel="immediate",
                resources={"metadata": {"path": job["root"]}},
                config=Config(KernelManager=kernel),
                log=SILENT,
            )
            environment = page_environment(self.scratch, job["threads"])
            return asyncio.run(self._watch(client, job, environment, cancelled))

    async def _watch(self, client, job: dict, environment: dict, cancelled) -> dict:
        number = 0  # the cell that is running

        async def execute() -> dict:
            nonlocal number
            start, *cells, finish = client.nb.cells
            pipes = {"stdin": lifeline, "stderr": subprocess.DEVNULL}
            async with client.async_setup_kernel(env=environment, **pipes):
                await client.async_execute_cell(start, 0)
                with contextlib.suppress(CellExecutionError):  # the recorder keeps the error
                    for number, cell in enumerate(cells, start=1):
                        await client.async_execute_cell(cell, number)
                done = cells[:number]
                await client.async_execute_cell(finish, len(cells) + 1)
            record = json.loads(ast.literal_eval(finish.outputs[-1]["data"]["text/plain"]))
            return {"outputs": [[dict(o) for o in cell.outputs] for cell in done], "record": record}

        lifeline, ours = os.pipe()  # the kernel ends when our side closes, be it by a kill
        task = asyncio.create_task(execute())
        try:
            while not (await asyncio.wait({task}, timeout=0.2))[0]:
                if cancelled.is_set():
                    task.cancel()
            return await task
        except asyncio.CancelledError:
            return {"died": "cancelled", "cell": number}
        except CellTimeoutError:
            return {"died": f"timeout: more than {job['timeout']:g} s", "cell": number}
        except Exception as error:  # the kernel died, or could not be started
            return {"died": f"its process ended: {last_line(error)}", "cell": number}
        finally:
            os.close(lifeline)
            os.close(ours)
