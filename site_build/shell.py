"""Runs one page's cells in this process: what a child of the fork server does."""

import sys

from IPython.core.displayhook import DisplayHook
from IPython.core.displaypub import DisplayPublisher
from IPython.core.interactiveshell import InteractiveShell
from traitlets.config import Config

from . import recorder


class Outputs(list):
    """A cell's outputs in their order, as in a notebook file."""

    def stream(self, name: str, text: str) -> None:
        if self and self[-1].get("name") == name:
            self[-1]["text"] += text
        else:
            self.append({"output_type": "stream", "name": name, "text": text})

    def rich(self, kind: str, data: dict, metadata: dict) -> None:
        self.append({"output_type": kind, "data": data, "metadata": metadata})


OUTPUTS = Outputs()


class Stream:
    encoding, errors = "utf-8", "strict"

    def __init__(self, name: str):
        self.name = name

    def write(self, text: str) -> int:
        OUTPUTS.stream(self.name, text)
        return len(text)

    def writelines(self, lines) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None: ...

    def isatty(self) -> bool:
        return False


class Publisher(DisplayPublisher):
    def publish(self, data, metadata=None, **_):
        OUTPUTS.rich("display_data", data, metadata or {})

    def clear_output(self, wait=False):
        OUTPUTS.clear()


class ResultHook(DisplayHook):
    def write_format_data(self, format_dict, md_dict=None):
        OUTPUTS.rich("execute_result", format_dict, md_dict or {})

    def write_output_prompt(self): ...

    def finish_displayhook(self): ...


class Shell(InteractiveShell):
    def showtraceback(self, *args, **kwargs):
        pass

    def showsyntaxerror(self, *args, **kwargs):
        pass

    def enable_gui(self, gui=None):
        pass


def make_shell() -> Shell:
    config = Config()
    config.HistoryManager.enabled = False  # it would start a thread: no fork after that
    shell = Shell.instance(config=config, display_pub_class=Publisher, displayhook_class=ResultHook)
    shell.InteractiveTB.set_mode("Context")
    return shell


def run_page(job: dict, shell: Shell, starting_cell) -> dict:
    """Run the cells up to the first that fails; `starting_cell(number)` precedes each."""
    record = recorder.start(job["page"], job["root"], job["ignore"], job["threads"])
    streams = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = Stream("stdout"), Stream("stderr")
    outputs = []
    for number, code in enumerate(job["cells"], start=1):
        starting_cell(number)
        OUTPUTS.clear()
        result = shell.run_cell(code, store_history=False)
        outputs.append(list(OUTPUTS))
        if not result.success:  # the recorder keeps the error
            break
    sys.stdout, sys.stderr = streams
    return {"outputs": outputs, "record": record.finish()}
