"""Records, inside a page's own process, what the page used, asserted and warned about.

Both back ends load this one file, so a page means the same wherever it runs.
"""

import builtins
import ctypes
import gc
import hashlib
import importlib
import os
import resource
import signal
import sys
import threading
import time
import traceback
import warnings
from importlib.machinery import PathFinder, SourceFileLoader

from .assertions import AssertionCounter

# What each top-level package imported, written by `prepare`: {importer: {imported}}.
IMPORTED: dict[str, set[str]] = {}

# The variables that native libraries read when they load.
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS")

# Readers in native code raise no audit event for the file that they open; their first
# argument is its path. A page that reads by another one needs a row here.
NATIVE_READERS = {
    "safetensors": ["safe_open"],
    "tokenizers": ["Tokenizer.from_file"],
    "tokenizers.models": [
        f"{model}.{reader}"
        for model in ("BPE", "WordPiece", "WordLevel")
        for reader in ("from_file", "read_file")
    ],
}


def measure(path: str, listing: bool = False) -> str:
    """The state of a path that a page's result depends on."""
    try:
        if listing:
            names = sorted(n for n in os.listdir(path) if n[0] != "." and n != "__pycache__")
            return "list:" + hashlib.sha256("\0".join(names).encode()).hexdigest()[:32]
        with open(path, "rb") as file:
            return "file:" + hashlib.file_digest(file, "sha256").hexdigest()[:32]
    except IsADirectoryError:
        return "folder"
    except OSError:
        return "absent"


def prepare() -> None:
    """Note from now on who imports whom, and what native readers open.

    Call it before importing any third-party package that is to be noted.
    """
    real_import, real_import_module = builtins.__import__, importlib.import_module

    def note(caller: dict | None, name: str) -> None:
        importer = ((caller or {}).get("__name__") or "").partition(".")[0]
        IMPORTED.setdefault(importer, set()).add(name.partition(".")[0] or importer)

    def noting_import(name, globals=None, locals=None, fromlist=(), level=0):
        if not level:
            note(globals, name)
        return real_import(name, globals, locals, fromlist, level)

    def noting_import_module(name, package=None):
        note(sys._getframe(1).f_globals, name)
        return real_import_module(name, package)

    builtins.__import__, importlib.import_module = noting_import, noting_import_module
    sys.meta_path.insert(0, AfterImport)


class AfterImport:
    """An import finder that changes a few modules right after they were loaded."""

    @staticmethod
    def find_spec(name: str, path, target=None):
        change = draw_once if name == "matplotlib.pyplot" else announce_readers
        if name not in NATIVE_READERS and change is announce_readers:
            return None
        spec = PathFinder.find_spec(name, path)
        if spec is not None:
            execute = spec.loader.exec_module
            spec.loader.exec_module = lambda module: (execute(module), change(module))
        return spec


def draw_once(pyplot) -> None:
    """Without pyplot's own hook, which draws each figure after a cell a second time."""
    pyplot.install_repl_displayhook = lambda: None


def announce_readers(module) -> None:
    """Have native readers raise Python's audit event for `open`."""
    for reader in NATIVE_READERS[module.__name__]:
        owner, _, name = reader.rpartition(".")
        owner = getattr(module, owner) if owner else module
        real = getattr(owner, name)

        def announcing(path, *args, real=real, **kwargs):
            sys.audit("open", path, "rb", 0)
            return real(path, *args, **kwargs)

        if isinstance(owner, type):  # a native class takes no new attributes, its dict does
            gc.get_referents(owner.__dict__)[0][name] = staticmethod(announcing)
            ctypes.pythonapi.PyType_Modified(ctypes.py_object(owner))
        else:
            setattr(owner, name, announcing)


class Recorder:
    """Watches one page in this process, from `__init__` to `finish`.

    It can't be taken off again (audit hooks stay): one process, one page.
    """

    def __init__(self, shell, *, page: str, root: str, ignore: list[str], threads: int):
        self.shell, self.page, self.root = shell, page, root
        self.ignore = tuple(ignore)
        self.uses: dict[str, str] = {}
        self.written: set[str] = set()
        self.cell = 0
        self.assertions: set[tuple[int, int, int]] = set()
        self.warnings: list[dict] = []
        self.error: dict | None = None
        self.busy = threading.local()

        sys.dont_write_bytecode = True  # a file written beside a module would wake `serve`
        os.chdir(root)
        sys.path.insert(0, root)
        importlib.invalidate_caches()
        IMPORTED.pop("__main__", None)
        self._watch_files()
        self._watch_cells()
        self._set_threads(threads)
        self.started = time.perf_counter(), cpu_seconds()

    # Files

    def _watch_files(self) -> None:
        sys.addaudithook(self._audit)
        sys.meta_path.insert(0, self)
        for name in ("stat", "lstat", "access"):  # these raise no audit event
            self._announce(name)

        real_get_code = SourceFileLoader.get_code

        def get_code(loader, fullname):
            path = loader.get_filename(fullname)
            if not self.inside(path):
                return real_get_code(loader, fullname)
            # Never a .pyc: its time stamp counts whole seconds, an edit may be quicker.
            return loader.source_to_code(loader.get_data(path), path)

        SourceFileLoader.get_code = get_code

    def _announce(self, name: str) -> None:
        real = getattr(os, name)
        setattr(os, name, lambda path, *a, **k: (self.used(path), real(path, *a, **k))[1])

    def _audit(self, event: str, args: tuple) -> None:
        if event == "open":
            path, mode, flags = args
            writes = any(c in mode for c in "wax+") if mode else flags & (os.O_WRONLY | os.O_RDWR)
            self.used(path, writes=bool(writes))
        elif event in ("os.listdir", "os.scandir"):
            # The import system lists folders to find modules; `find_spec` is exact there.
            importing = "importlib" in sys._getframe(1).f_code.co_filename
            if not importing:
                self.used(args[0] if args[0] is not None else ".", listing=True)

    def find_spec(self, name: str, path, target=None):
        """As the first finder: note each place where the import system will look."""
        tail = name.rpartition(".")[2]
        for folder in sys.path if path is None else path:
            place = os.path.join(folder or os.getcwd(), tail)
            for candidate in (os.path.join(place, "__init__.py"), place + ".py"):
                if self.inside(candidate) and self.used(candidate).startswith("file:"):
                    return None
        return None

    def inside(self, path: str) -> bool:
        ours = path.startswith(self.root + os.sep) and "__pycache__" not in path
        return ours and not path.startswith(self.ignore)

    def used(self, path, *, writes: bool = False, listing: bool = False) -> str:
        """Note a path in the state it has now; returns that state."""
        if isinstance(path, int) or getattr(self.busy, "now", False):
            return ""
        path = os.path.abspath(os.fsdecode(path))
        if not self.inside(path) and not (listing and path == self.root):
            return ""
        key = os.path.relpath(path, self.root) + ("/" if listing else "")
        if writes:
            self.written.add(key)
        if key not in self.uses:
            self.busy.now = True  # measuring opens the file too
            try:
                self.uses[key] = measure(path, listing)
            finally:
                self.busy.now = False
        return self.uses[key]

    # Cells

    def _watch_cells(self) -> None:
        self.shell.events.register("pre_run_cell", self._before_cell)
        self.shell.events.register("post_run_cell", self._after_cell)
        self.shell.compile.get_code_name = lambda *_: self.cell_name(self.cell)
        self.shell.ast_transformers.append(AssertionCounter(lambda: self.cell))
        builtins.__asserted__ = lambda *place: self.assertions.add(place)
        warnings.simplefilter("default")
        warnings.simplefilter("ignore", ResourceWarning)
        self.real_showwarning = warnings.showwarning
        warnings.showwarning = self._warned

    def cell_name(self, number: int) -> str:
        return f"{self.page}, cell {number}"

    def _before_cell(self, info) -> None:
        self.cell += 1

    def _after_cell(self, result) -> None:
        error = result.error_before_exec or result.error_in_exec
        if error is not None and self.error is None:
            self.error = {
                "cell": self.cell,
                "line": self._line_of(error),
                "message": last_line(error),
                "traceback": self._traceback(error),
            }

    def _line_of(self, error: BaseException) -> int:
        """The line within the cell: of a syntax error, or the page's innermost frame."""
        here = self.cell_name(self.cell)
        lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == here]
        return (lines or [getattr(error, "lineno", None) or 1])[-1]

    def _traceback(self, error: BaseException) -> str:
        """As Python prints it, from the page's own frame on."""
        frames = error.__traceback__
        while frames and not frames.tb_frame.f_code.co_filename.startswith(f"{self.page}, cell"):
            frames = frames.tb_next
        return "".join(traceback.format_exception(type(error), error, frames))

    def _warned(self, message, category, filename, lineno, file=None, line=None) -> None:
        text = f"{category.__name__}: {message}".strip().splitlines()[-1]
        page, _, cell = filename.rpartition(", cell ")
        if page == self.page:  # not always this cell: an earlier one may have the function
            self.warnings.append({"cell": int(cell), "line": lineno, "message": text})
        elif filename.startswith(os.path.join(self.root, "snippets", "")):
            text = f"{os.path.relpath(filename, self.root)}:{lineno}: {text}"
            self.warnings.append({"cell": self.cell, "line": 1, "message": text})
        self.real_showwarning(message, category, filename, lineno, file, line)

    def _set_threads(self, threads: int) -> None:
        os.environ |= dict.fromkeys(THREADS, str(threads))  # for libraries yet to be loaded
        if "torch" in sys.modules:
            sys.modules["torch"].set_num_threads(threads)

    # The end

    def finish(self) -> dict:
        seconds, cpu = self.started
        for key in self.written:  # what the page wrote itself counts as it left it
            self.uses[key] = measure(os.path.join(self.root, key))
        unit = 1 if sys.platform == "darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        return {
            "uses": dict(sorted(self.uses.items())),
            "imports": sorted(reachable("__main__")),
            "assertions": sorted(self.assertions),
            "warnings": self.warnings,
            "error": self.error,
            "seconds": round(time.perf_counter() - seconds, 3),
            "cpu_seconds": round(cpu_seconds() - cpu, 3),
            "peak_memory_mb": round(peak / 2**20, 1),
        }


def cpu_seconds() -> float:
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def last_line(error: BaseException) -> str:
    lines = "".join(traceback.format_exception_only(error)).strip().splitlines()
    kind = type(error).__name__
    return lines[-1] if lines[-1].startswith(kind) else f"{kind}: {lines[-1].strip()}"


def reachable(start: str) -> set[str]:
    """The packages that `start` imports, and those that they import in turn."""
    found, todo = set(), [start]
    while todo:
        new = IMPORTED.get(todo.pop(), set()) - found
        found |= new
        todo.extend(new)
    return found & {name.partition(".")[0] for name in sys.modules}


def set_figure_format(shell) -> None:
    """Figures as PNG with 1.5 pixels a CSS pixel: sharp on phones, light to load."""
    from IPython.core import pylabtools
    from traitlets.config import Config

    from .figures import print_figure

    pylabtools.print_figure = print_figure
    config = Config()
    # The style leaves room for labels; a tight box would draw each figure twice.
    config.InlineBackend.print_figure_kwargs = {"bbox_inches": None, "dpi": 150}
    shell.update_config(config)


def end_with_stdin() -> None:
    """End this process and all that it started when standard input closes."""

    def wait() -> None:
        os.read(0, 1)
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=wait, daemon=True).start()


def start(page: str, root: str, ignore: list[str], threads: int) -> Recorder:
    """What both back ends call before the first cell."""
    from IPython.core.getipython import get_ipython

    shell = get_ipython()
    set_figure_format(shell)
    return Recorder(shell, page=page, root=root, ignore=ignore, threads=threads)
