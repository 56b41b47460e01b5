"""Nothing broken gets out: what fails the build, and what is left standing then."""

import signal
import subprocess
import sys
import time

import psutil
import pytest

GOOD = "from snippets.value import value\nassert value() > 0"


def test_a_failing_cell_is_named_with_page_cell_line_and_error(project):
    project.page("a.md", GOOD, "x = 1\nassert value() == 2, 'first\\nlast line'")
    assert project.problems() == ["a.md: cell 2, line 10: AssertionError: last line"]
    assert project.report()["errors"] == project.problems()


def test_the_line_is_the_pages_own_where_a_module_raises(project):
    project.write("snippets/value.py", "def value():\n    raise ValueError('no value')\n")
    project.page("a.md", "from snippets.value import value\n\n\nassert value()")
    assert project.problems() == ["a.md: cell 1, line 7: ValueError: no value"]


def test_a_syntax_error_has_its_line(project):
    project.page("a.md", GOOD, "x = 1\nx = = 2")
    (problem,) = project.problems()
    assert problem.startswith("a.md: cell 2, line 10: SyntaxError")


def test_all_offenders_are_listed_together(project):
    project.page("a.md", "1 / 0")
    project.page("b.md", "import math\nassert math.pi > 4")
    project.page("c.md", "print('no assertion')")
    project.page("d.md", GOOD)
    project.write("site_src/e.md", "```python colour=red\nx\n```\n")
    problems = "\n".join(project.problems())
    assert "a.md: cell 1, line 4: ZeroDivisionError: division by zero" in problems
    assert "b.md: cell 1, line 5: AssertionError" in problems
    assert "c.md: its 1 cells assert nothing" in problems
    assert "e.md:1: unknown cell option 'colour'" in problems
    assert "d.md" not in problems


def test_other_pages_results_are_kept_and_the_report_has_the_error(project):
    project.page("bad.md", "1 / 0")
    project.page("good.md", GOOD)
    project.problems()
    assert "ZeroDivisionError" in project.about("bad.md")["error"]
    assert project.about("good.md")["executed"] and not project.about("good.md")["error"]
    project.page("bad.md", GOOD)
    assert project.ran() == ["bad.md"]


def test_a_failure_is_never_cached(project):
    project.page("a.md", GOOD, "1 / 0")
    project.problems()
    project.problems()
    assert project.about("a.md")["executed"]


def test_a_timeout(project):
    """The wall-clock limit is ten times the budget of CPU seconds."""
    project.page("a.md", GOOD, "import time\ntime.sleep(60)", meta="cpu_seconds: 0.3")
    started = time.monotonic()
    (problem,) = project.problems()
    assert problem.startswith("a.md: cell 2, line 12: timeout: more than 3 s")
    assert time.monotonic() - started < 20


def test_over_the_budget_of_cpu_seconds(project):
    work = "import time\nend = time.process_time() + 2\nwhile time.process_time() < end: pass\n"
    project.page("a.md", work + GOOD, meta="cpu_seconds: 1.5")  # the wall-clock limit is 15 s
    project.page("study.md", work + GOOD, meta="study: true")
    project.options |= {"cpu_seconds": 1.5, "study_cpu_seconds": 60}
    (problem,) = project.problems()
    assert problem.startswith("a.md: 2.") and "over its budget of 1.5" in problem


def test_a_page_that_asserts_nothing(project):
    project.page("a.md", "print(1)", "assert True\nassert 1 + 1 == 2")
    assert project.problems() == ["a.md: its 2 cells assert nothing"]


@pytest.mark.parametrize("leave", ["import os\nos._exit(3)", "import os\nos.kill(os.getpid(), 11)"])
def test_a_page_whose_process_dies(project, leave):
    project.page("a.md", GOOD, leave)
    project.page("b.md", GOOD)
    (problem,) = project.problems()
    assert problem.startswith("a.md: cell 2, line 9: its process ended")
    assert not project.about("b.md")["error"]


def test_a_package_to_preload_that_is_not_there(quick):
    quick.options |= {"preload": ["no_such_package"], "backend": "fork"}
    quick.page("a.md", GOOD)
    quick.page("b.md", GOOD)
    problems = quick.problems()
    assert [p.partition(": ")[0] for p in problems] == ["a.md", "b.md"]
    assert all("the fork server has ended" in p for p in problems)


def test_warnings_from_the_page_or_from_snippets(project):
    project.write(
        "snippets/warns.py", "import warnings\ndef f():\n    warnings.warn('in snippet')\n"
    )
    project.page("a.md", "import warnings\nwarnings.warn('in page')\n" + GOOD)
    project.page("b.md", "from snippets.warns import f\nf()\n" + GOOD)
    later = "import warnings\ndef f():\n    warnings.warn('defined before')\n"
    project.page("e.md", later + GOOD, "f()")
    project.write("tools/far.py", "import warnings\ndef f():\n    warnings.warn('far')\n")
    project.page("c.md", "from tools.far import f\nf()\n" + GOOD)
    project.page("d.md", "import warnings\nwith warnings.catch_warnings(record=True):\n"
                 "    warnings.warn('expected')\n" + GOOD)  # fmt: skip
    assert project.problems() == [
        "a.md: cell 1, line 5: UserWarning: in page",
        "b.md: cell 1, line 4: snippets/warns.py:3: UserWarning: in snippet",
        "e.md: cell 1, line 6: UserWarning: defined before",
    ]


def test_a_figure_without_alt_text(project):
    figure = "import matplotlib.pyplot as plt\nassert plt.plot([1, 2]);"
    project.page("a.md", figure)
    project.page("b.md", figure, info='alt="A line"')
    (problem,) = project.problems()
    assert problem.startswith("a.md: cell 1, line 4: a figure without alt text")


@pytest.mark.parametrize(
    "source, said",
    [
        ("```python\nx\n", "x.md:1: this fence is never closed"),
        ("> ```python\n> x\n> ```\n", "x.md:1: a cell can't stand in a block quote"),
        ("```python hide=maybe\nx\n```\n", "x.md:1: hide is source, output or all"),
        ("---\ncpu_seconds: soon\n---\n", "x.md:1: metadata: cpu_seconds can't be 'soon'"),
        ("---\nthreads: 0\n---\n", "metadata: threads can't be 0"),
        ("---\nnotebook: old\n---\n", "metadata: notebook can't be 'old'"),
        ("---\na: [\n---\n", "the metadata is not YAML"),
        (
            "<!-- show: snippets/nowhere.py -->\n",
            "x.md: show: there is no module snippets/nowhere.py",
        ),
    ],
)
def test_sources_that_cannot_be_read(quick, source, said):
    quick.write("site_src/x.md", source)
    (problem,) = quick.problems()
    assert said in problem


def test_two_sources_of_one_page(quick):
    quick.write("site_src/x.md", "# X")
    quick.write("site_src/x.ipynb", '{"cells": []}')
    assert quick.problems() == ["x.md: x.ipynb is there too: one page, one source"]


# The site


@pytest.mark.parametrize("quiet", [[], ["-q"]])
def test_a_failing_cell_leaves_the_old_site_and_exits_with_1(quick, quiet):
    quick.page("a.md", GOOD)
    assert quick.mkdocs("build")[0] == 0
    before = quick.site()
    quick.page("a.md", GOOD, "1 / 0")
    code, output = quick.mkdocs("build", *quiet)
    assert code == 1 and "a.md: cell 2, line 9: ZeroDivisionError: division by zero" in output
    assert quick.site() == before and b"division" not in before["a/index.html"]


@pytest.mark.parametrize("quiet", [[], ["-q"]])
def test_a_broken_link_leaves_the_old_site_and_exits_with_1(quick, quiet):
    """Strict mode aborts after on_post_build, so the swap must come later still."""
    quick.page("a.md", GOOD)
    assert quick.mkdocs("build")[0] == 0
    before = quick.site()
    quick.write("site_src/index.md", "# Home\n\n[gone](nowhere.md)\n")
    code, output = quick.mkdocs("build", *quiet)
    assert code == 1 and "nowhere.md" in output
    assert quick.site() == before
    assert not list(quick.root.glob(".site.*"))
    quick.write("site_src/index.md", "# Home again\n")
    assert quick.mkdocs("build", *quiet)[0] == 0
    assert b"Home again" in quick.site()["index.html"]


def test_a_bad_option_says_what_was_meant(quick):
    quick.edit("mkdocs.yml", '"workers"', '"wrokers"')
    code, output = quick.mkdocs("build")
    assert code == 1 and "unknown option 'wrokers'; did you mean workers?" in output
    quick.edit("mkdocs.yml", '"wrokers": 2', '"workers": "two"')
    code, output = quick.mkdocs("build")
    assert code == 1 and "workers must be of type int, not 'two'" in output


def kill_when(project, condition, *command: str) -> None:
    process = project.start("mkdocs", "build", *command)
    deadline = time.monotonic() + 60
    while not condition() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.kill()
    process.communicate()


def children_of_this_test(marker: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter(["cmdline", "cwd", "status"]):
        cwd, status = process.info["cwd"] or "", process.info["status"]
        if cwd.startswith(marker) and status != psutil.STATUS_ZOMBIE:
            found.append(process)
    return found


def no_orphans(marker: str) -> bool:
    deadline = time.monotonic() + 15
    while children_of_this_test(marker) and time.monotonic() < deadline:
        time.sleep(0.1)
    return not children_of_this_test(marker)


def test_a_kill_while_pages_run_leaves_no_orphans_and_loses_nothing(project):
    project.page("a.md", GOOD)
    assert project.mkdocs("build")[0] == 0
    before = project.site()
    project.page("fast.md", GOOD)
    slow = "import subprocess, pathlib\npathlib.Path('started').touch()\nsubprocess.run(['sleep', '300'])\n"
    project.page("slow.md", slow + GOOD)
    started = project.root / "started"
    kept = project.root / "build/cache/fast.md.json"
    kill_when(project, lambda: started.exists() and kept.exists())
    assert no_orphans(str(project.root))
    assert project.site() == before
    project.page("slow.md", GOOD)
    assert project.ran() == ["slow.md"]


def test_a_timeout_ends_what_the_page_started(project):
    project.page(
        "a.md", GOOD, "import subprocess\nsubprocess.run(['sleep', '300'])", meta="cpu_seconds: 0.2"
    )
    assert "timeout" in project.problems()[0]
    assert no_orphans(str(project.root))


@pytest.mark.parametrize("delay", [0.0, 0.01, 0.1])
def test_a_kill_around_the_swap_leaves_one_whole_site(quick, delay):
    quick.page("a.md", GOOD, "print('old')")
    assert quick.mkdocs("build")[0] == 0
    quick.page("a.md", GOOD, "print('new')")
    sitemap = quick.root / ".site.building/sitemap.xml"

    def late() -> bool:
        if sitemap.exists() or (quick.root / ".site.ready").exists():
            time.sleep(delay)
            return True
        return False

    kill_when(quick, late)
    recovered = quick.root / "site/a/index.html"
    code, output = quick.mkdocs("build", "-d", "elsewhere")
    assert code == 0, output
    code, output = quick.mkdocs("build")
    assert code == 0 and b"new" in recovered.read_bytes()


@pytest.mark.parametrize("stop", range(4))
def test_the_swap_is_finished_or_undone_at_the_next_start(tmp_path, stop, monkeypatch):
    """A kill after each of its steps, one by one."""
    from site_build import publish

    site = tmp_path / "site"
    site.mkdir()
    (site / "page").write_text("old")
    building = publish.staging(site)
    (building / "page").write_text("new")
    steps = iter(range(10))

    class Killed(BaseException): ...

    def maybe(real):
        def step(*args, **kwargs):
            if next(steps) == stop:
                raise Killed
            return real(*args, **kwargs)

        return step

    with monkeypatch.context() as patch:
        patch.setattr(publish.os, "rename", maybe(publish.os.rename))
        patch.setattr(publish.shutil, "rmtree", maybe(publish.shutil.rmtree))
        with pytest.raises(Killed):
            publish.publish(site)
    publish.staging(site)  # the next start
    assert (site / "page").read_text() == ("old" if stop == 0 else "new")
    assert [p.name for p in tmp_path.iterdir() if p.name != ".site.building"] == ["site"]


def test_two_builds_at_once(quick):
    slow = "import time\ntime.sleep(1)\n"
    quick.page("a.md", slow + GOOD)
    quick.page("b.md", slow + GOOD)
    processes = [quick.start("mkdocs", "build") for _ in range(2)]
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert sum("waiting for another build" in output for output in outputs) == 1
    assert "a/index.html" in quick.site()
    assert quick.ran() == []


def test_a_waiting_build_that_is_stopped_leaves_the_other_alone(quick):
    go = quick.root / "go"
    wait = f"import os, time\nend = time.time() + 60\nwhile not os.path.exists('{go}') and time.time() < end: time.sleep(.05)\n"
    quick.page("a.md", wait + GOOD)
    first = quick.start("mkdocs", "build")
    staged = quick.root / ".site.building"
    until(staged.exists)
    second = quick.start("mkdocs", "build")
    time.sleep(3)
    second.send_signal(signal.SIGINT)
    second.communicate(timeout=30)
    assert staged.exists()
    go.touch()
    output, _ = first.communicate(timeout=60)
    assert first.returncode == 0, output
    assert "a/index.html" in quick.site()


def until(condition, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    assert condition()


def test_it_builds_without_mkdocs(quick):
    quick.page("a.md", GOOD)
    command = [sys.executable, "-m", "site_build", "build", "--output", "tree"]
    done = subprocess.run(command, cwd=quick.root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "assert value()" in (quick.root / "tree/a.md").read_text()
    quick.page("a.md", "1 / 0")
    done = subprocess.run(command, cwd=quick.root, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "a.md: cell 1, line 4: ZeroDivisionError" in done.stderr


MAKING = """
from pathlib import Path

def prepare(root: Path) -> None:
    target = root / "build/made.txt"
    target.parent.mkdir(exist_ok=True)
    if not target.is_file():
        target.write_text("41")
"""


def test_what_pages_read_is_made_before_they_run(quick, monkeypatch):
    quick.write("making.py", MAKING)
    monkeypatch.syspath_prepend(quick.root)
    monkeypatch.delitem(sys.modules, "making", raising=False)
    quick.options["prepare"] = ["making"]
    quick.page("a.md", "print(open('build/made.txt').read())\nassert open('build/made.txt').read()")
    assert quick.ran() == ["a.md"] and "41" in quick.text("a.md")
    assert quick.ran() == []
    (quick.root / "build/made.txt").write_text("42")
    assert quick.ran() == ["a.md"] and "42" in quick.text("a.md")
    (quick.root / "build/made.txt").unlink()
    assert quick.ran() == ["a.md"] and "41" in quick.text("a.md")


def test_a_step_that_fails_is_named(quick):
    quick.options["prepare"] = ["no_such_step"]
    quick.page("a.md", "assert open('mkdocs.yml').read()")
    assert "prepare: ModuleNotFoundError: No module named 'no_such_step'" in quick.problems()
