"""What stderr has while a command runs: secateur's own lines, and those of other packages with `--verbose`."""

import logging
import os
import warnings

import pytest

from secateur import cli
from secateur.errors import SecateurError, SecateurWarning


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("verbose", [False, True])
def test_what_other_packages_say_is_shown_with_verbose_alone(verbose, capsys, monkeypatch):
    """Ours and errors are shown always, and all is as it was afterwards."""

    def load(*_, **__):
        warnings.warn("warned elsewhere", FutureWarning, stacklevel=1)
        warnings.warn("ours", SecateurWarning, stacklevel=1)
        raise SecateurError("stopped")

    monkeypatch.setattr("secateur.models.loading.load_model", load)
    monkeypatch.delenv("KINETO_LOG_LEVEL", raising=False)
    others = []
    monkeypatch.setattr(warnings, "showwarning", show := lambda message, *_: others.append(str(message)))
    code = cli.main(["info", "anything", *(["--verbose"] if verbose else [])])
    err = capsys.readouterr().err
    assert (code, err) == (2, "secateur: ours\nsecateur: error: stopped\n")
    assert others == (["warned elsewhere"] if verbose else [])
    assert logging.root.manager.disable == logging.NOTSET
    assert os.environ["TRANSFORMERS_VERBOSITY"] == "error"  # as tests set it
    assert warnings.showwarning is show
    assert "KINETO_LOG_LEVEL" not in os.environ


@pytest.mark.parametrize("verbose", [False, True])
def test_other_packages_log_errors_alone(verbose, caplog, monkeypatch):
    def load(*_, **__):
        logging.getLogger("another").warning("a warning")
        logging.getLogger("another").error("an error")
        raise SecateurError("stopped")

    monkeypatch.setattr("secateur.models.loading.load_model", load)
    cli.main([*(["--verbose"] if verbose else []), "info", "anything"])
    assert caplog.messages == (["a warning", "an error"] if verbose else ["an error"])
