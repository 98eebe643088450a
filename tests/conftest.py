from __future__ import annotations

import copy
import gc
import os
import signal
import sys
from pathlib import Path

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of what the tests start: see below

import secateur  # noqa: F401 - reloading is part of what every test relies on

torch.set_num_threads(1)  # tests run in as many processes as there are cores, and their matrices are tiny

pytest.register_assert_rewrite("tests.support")
pytest_plugins = ["tests.support.outcomes"]

SHARED = Path(os.environ.get("SECATEUR_SHARED", Path(__file__).resolve().parents[1].parent / "shared"))


@pytest.fixture(scope="module", autouse=True)
def what_is_imported_is_no_garbage():
    """Every training collects garbage, and looking through all that is imported took a third of a second each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def one_thread():
    """Tiny matrices gain nothing from threads, and threads that wait for each other on a busy machine cost minutes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def heard():
    """A process that was started in the background ignores Ctrl-C, and so does every test in it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def remote_code(tmp_path, monkeypatch):
    """Code that comes with models is kept in a folder of the test's own, and none of another test's is loaded."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "transformers_modules"]:
        del sys.modules[name]


@pytest.fixture(scope="session")
def minilm_folder() -> Path:
    from secateur.demo import demo_model
    from secateur.errors import InvalidInputError

    try:
        return demo_model()
    except InvalidInputError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def loaded_minilm(minilm_folder):
    from transformers import AutoModel

    return AutoModel.from_pretrained(minilm_folder).eval()


@pytest.fixture
def minilm(loaded_minilm):
    return copy.deepcopy(loaded_minilm)


@pytest.fixture(scope="session")
def tokenizer(minilm_folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(minilm_folder)


@pytest.fixture
def batch(tokenizer):
    from tests.support.sentences import SENTENCES

    return dict(tokenizer(SENTENCES, padding=True, return_tensors="pt"))


@pytest.fixture(scope="session")
def shared() -> Path:
    if not SHARED.is_dir():
        pytest.skip(f"no folder {SHARED} with the authors' checkpoints and the GLUE files; set SECATEUR_SHARED")
    return SHARED


@pytest.fixture(scope="session")
def onnx_classifier(tmp_path_factory) -> Path:
    """A folder with `pruned`, a tiny classifier with an emptied site, and `onnx`, its export by the command.

    It is made once for all processes of a test run: an export takes seconds.
    """
    from filelock import FileLock

    from secateur import cli
    from secateur.removal.remove import remove_
    from secateur.sites.attention import find_sites
    from tests.support.tiny import tiny_classifier, tiny_tokenizer, uneven_mask

    common = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        common = common.parent
    folder = common / "onnx"
    with FileLock(common / "onnx.lock"):
        if not (folder / "onnx").is_dir():
            model = tiny_classifier("bert")
            remove_(model, uneven_mask(find_sites(model), empty=True))
            model.save_pretrained(folder / "pruned")
            tiny_tokenizer().save_pretrained(folder / "pruned")
            assert cli.main(["export", str(folder / "pruned"), "--format", "onnx", "--out", str(folder / "onnx")]) == 0
    return folder
