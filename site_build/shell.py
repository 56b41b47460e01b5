"""Runs one page's cells in this process: what a child of the fork server does."""

import sys

from IPython.core.displayhook import DisplayHook
from IPython.core.displaypub import DisplayPublisher
from IPython.core.interactiveshell import InteractiveShell
from traitlets.config import Config

from . import recorder

OUTPUTS: list[dict] = []  # of the running cell, in their order, as in a notebook file


class Stream:
    encoding = "utf-8"

    def __init__(self, name: str):
        self.name = name

    def write(self, text: str) -> int:
        if not OUTPUTS or OUTPUTS[-1].get("name") != self.name:
            OUTPUTS.append({"output_type": "stream", "name": self.name, "text": ""})
        OUTPUTS[-1]["text"] += text
        return len(text)

    def flush(self) -> None: ...

    def isatty(self) -> bool:
        return False


class Publisher(DisplayPublisher):
    def publish(self, data, metadata=None, **_):
        output = {"output_type": "display_data", "data": data, "metadata": metadata or {}}
        OUTPUTS.append(output)

    def clear_output(self, wait=False):
        OUTPUTS.clear()


class ResultHook(DisplayHook):
    cell = ""  # the running one

    def quiet(self) -> bool:
        """A semicolon at the end hides the result. IPython looks in its history, which is off."""
        return self.semicolon_at_end_of_expression(self.cell)

    def write_format_data(self, format_dict, md_dict=None):
        self.shell.display_pub.publish(format_dict, md_dict)

    def write_output_prompt(self): ...

    def finish_displayhook(self): ...


class Shell(InteractiveShell):
    def showtraceback(self, *args, **kwargs): ...  # the recorder keeps the error

    def showsyntaxerror(self, *args, **kwargs): ...

    def enable_gui(self, gui=None): ...


def make_shell() -> Shell:
    config = Config()
    config.HistoryManager.enabled = False  # it would start a thread: no fork after that
    shell = Shell.instance(config=config, display_pub_class=Publisher, displayhook_class=ResultHook)
    recorder.set_figure_format(shell)
    return shell


def warm_figures(shell: Shell) -> None:
    """Draw once, so that no child pays for the first figure."""
    from IPython.core.pylabtools import print_figure
    from matplotlib import pyplot

    shell.run_line_magic("matplotlib", "inline")
    figure, axes = pyplot.subplots()
    axes.plot([0, 1], label="$x$")
    axes.legend()
    print_figure(figure, bbox_inches=None)
    pyplot.close(figure)


def run_page(job: dict, starting_cell) -> dict:
    """Run the cells up to the first that fails; `starting_cell(number)` precedes each."""
    shell = Shell.instance()
    record = recorder.start(job["page"], job["root"], job["ignore"], job["threads"])
    sys.stdout, sys.stderr = Stream("stdout"), Stream("stderr")
    outputs = []
    for number, code in enumerate(job["cells"], start=1):
        starting_cell(number)
        OUTPUTS.clear()
        shell.displayhook.cell = shell.transform_cell(code)
        success = shell.run_cell(code, store_history=False).success
        outputs.append(list(OUTPUTS))
        if not success:
            break
    return {"outputs": outputs, "record": record.finish()}
