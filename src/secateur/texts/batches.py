"""A batch of texts as a model takes it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

Batch: TypeAlias = Mapping[str, Any]
"""Keyword arguments of one forward pass: tensors, and switches such as `use_cache`."""
