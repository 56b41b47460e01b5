"""Shared by all tests: shapes of `snippets` are checked while they run."""

import gc
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock
from jaxtyping import config as jaxtyping_config
from jaxtyping import install_import_hook

from tests.browser import chromium, served

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", NO_MKDOCS_2_WARNING="1")
# Triton decides when it is imported, and torch imports it.
os.environ.setdefault("TRITON_INTERPRET", "0" if Path("/dev/nvidia0").exists() else "1")
install_import_hook("snippets", "beartype.beartype")


ROOT = Path(__file__).parents[1]


def pytest_collection_finish(session):
    """What collection imported stays until the end; the collector needn't visit it each time."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish(session):
    gc.unfreeze()


def shared(tmp_path_factory, worker_id: str) -> Path:
    """The folder that all workers of this run have in common."""
    ours = tmp_path_factory.getbasetemp()
    return ours if worker_id == "master" else ours.parent


@pytest.fixture(scope="session")
def site(tmp_path_factory, worker_id) -> Path:
    """The real site, built strictly; once for all workers."""
    common = shared(tmp_path_factory, worker_id)
    folder, built = common / "site", common / "site.built"
    with FileLock(common / "site.lock"):
        if not built.exists():
            command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", str(folder)]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stdout + done.stderr
            built.touch()
    return folder


@pytest.fixture(scope="session")
def report(site) -> dict:
    return json.loads((ROOT / "build/report.json").read_text())


# Not of the session: the renderer of diagrams starts a browser too, and one thread has one.
@pytest.fixture(scope="module")
def browser():
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="session")
def address(site):
    with served(site) as base:
        yield base


@pytest.fixture
def unchecked():
    """Without jaxtyping, as readers run it: the module's own refusals answer."""
    jaxtyping_config.update("jaxtyping_disable", True)
    yield
    jaxtyping_config.update("jaxtyping_disable", False)


@pytest.fixture(autouse=True)
def alike():
    """Whatever ran before in this process: threads, seed, no memory of what was compiled."""
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)
    torch.compiler.reset()
