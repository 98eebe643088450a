"""secateur: remove what of a Transformer a task does not need, prove the result, reload it with `from_pretrained`.

Importing this package is cheap. As soon as transformers is there too, every `from_pretrained` can rebuild models that
were pruned; models without a `head_pruning` entry in their config are not touched.
"""

from __future__ import annotations

from typing import Any

import lazy_loader
import wrapt

from secateur.support.versions import __version__ as __version__

# `secateur --help` must not wait for torch: the names in `__init__.pyi` are imported at their first use.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)


@wrapt.when_imported("transformers.modeling_utils")
def _reload_pruned_models(module: Any) -> None:
    from secateur.removal.checkpoint import install

    install()
