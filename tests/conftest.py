"""Shared by all tests: shapes of `snippets` are checked while they run."""

import os

import pytest
from jaxtyping import install_import_hook

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", NO_MKDOCS_2_WARNING="1")
install_import_hook("snippets", "beartype.beartype")


@pytest.fixture(autouse=True)
def one_thread():
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)
