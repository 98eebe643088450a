"""A model made ready for the steps of pruning: its sites found once, its calibration texts tokenised once."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterable, Sequence
from functools import cached_property
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from secateur.errors import InvalidInputError, UnsupportedModelError, invalid
from secateur.models.base_model import base_of
from secateur.models.inputs import ForwardArguments, max_length
from secateur.models.loading import load_tokenizer
from secateur.models.names import original_name
from secateur.models.offload import device_of
from secateur.models.sentence_transformers import transformer_of
from secateur.settings import Reading
from secateur.sites.attention import find_sites
from secateur.sites.feed_forward import FeedForwardSite
from secateur.sites.finding import check_units, find_layers, find_neurons, kinds_named
from secateur.sites.layers import LayerSite
from secateur.sites.layout import AttentionSite, Site
from secateur.support.checks import check_tokenizer
from secateur.texts.examples import Example, Row, are_rows, by_form, check_examples, examples_of, in_parts, joined
from secateur.texts.tokenization import Text, padded, rows_of, tokenize
from secateur.texts.whole_tables import how_to_choose, is_table


class PreparedModel:
    """A model with its base model, sites and tokenizer, each looked up once, and texts tokenised once.

    Every step of a pruning may be handed one in place of the model: then they share what was found. `model` is a
    transformers model or a SentenceTransformer; `tokenizer` is looked up by the model's name where it is None. `keeps`
    says of which texts the tokens are kept, for steps that read them again: None = of all.
    """

    keeps: frozenset[Text] | None = frozenset()

    def __init__(
        self, model: nn.Module, tokenizer: PreTrainedTokenizerBase | None = None, reading: Reading | None = None
    ) -> None:
        self.whole = model
        self.model = transformer_of(model)
        self.base = base_of(self.model)
        self._tokenizer = tokenizer
        self._max_length = (Reading() if reading is None else reading).max_length
        self._tokens: dict[Text, dict[str, list[int]]] = {}

    @classmethod
    def of(
        cls,
        model: nn.Module | PreparedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        reading: Reading | None = None,
    ) -> PreparedModel:
        """Return a prepared model as it is, and prepare another."""
        return model if isinstance(model, PreparedModel) else cls(model, tokenizer, reading)

    @cached_property
    def sites(self) -> dict[str, AttentionSite]:
        """The model's attention sites. Raises what `find_sites` raises."""
        return find_sites(self.model)

    @cached_property
    def neurons(self) -> dict[str, FeedForwardSite]:
        """The model's feed-forward sites. Raises what `find_neurons` raises."""
        return find_neurons(self.model)[0]

    @cached_property
    def layers(self) -> dict[str, LayerSite]:
        """The model's lists of layers. Raises what `find_layers` raises."""
        return find_layers(self.model)

    @property
    def lists(self) -> Collection[str]:
        """The paths of the model's lists of layers, none where it has no such list."""
        try:
            return self.layers
        except UnsupportedModelError:
            return ()

    def sites_of(self, units: Collection[str]) -> dict[str, Site]:
        """Return the sites of these kinds, heads first, then neurons, then layers."""
        check_units(units)
        own = {"heads": "sites", "neurons": "neurons", "layers": "layers"}
        return {name: site for kind in own if kind in units for name, site in getattr(self, own[kind]).items()}

    def sites_named(self, names: Iterable[str]) -> dict[str, Site]:
        """Return the sites of the kinds that these names of sites are of."""
        return self.sites_of(kinds_named(self.base, names))

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer. Raises `InvalidInputError` where none was handed over and the model names none."""
        return own_tokenizer(self.whole) if self._tokenizer is None else self._tokenizer

    @property
    def knows_tokenizer(self) -> bool:
        """Whether a tokenizer was handed over, or has been looked up."""
        return self._tokenizer is not None or "tokenizer" in vars(self)

    @property
    def text_config(self) -> Any:
        """The part of the config that is about texts, which names special tokens too."""
        return self.base.config.get_text_config()

    @cached_property
    def longest(self) -> int:
        """Tokens of a text at most: those asked for, cut to what the model has positions for."""
        return min(self._max_length, max_length(self.model, self._max_length))

    def batches(self, examples: Sequence[Example], batch_size: int) -> Batches:
        """Return consecutive batches of keyword arguments for the base model, each made when it is asked for.

        Rows of ready inputs share a batch where their shapes are the same. Raises `InvalidInputError` for what
        `check_examples` refuses, and for texts where the model reads something else.
        """
        check_examples(examples)
        if not are_rows(examples):
            check_reads_texts(self.model)
            check_tokenizer(self.tokenizer)
        return Batches(self, examples, batch_size)

    def batch(self, examples: Sequence[Any]) -> dict[str, Any]:
        """Return one batch of keyword arguments for the base model."""
        if are_rows(examples):
            return self._arguments.of(joined(examples, device_of(self.base)))
        return self._of_texts(examples)

    def _of_texts(self, texts: Sequence[Text]) -> dict[str, Any]:
        new = [text for text in dict.fromkeys(texts) if text not in self._tokens]
        made = dict(zip(new, rows_of(tokenize(self.tokenizer, new, self.longest)), strict=True)) if new else {}
        rows = [made[text] if text in made else self._tokens[text] for text in texts]
        self._tokens |= {text: row for text, row in made.items() if self.keeps is None or text in self.keeps}
        return self._arguments.of(padded(self.tokenizer, rows, device_of(self.base)))

    @cached_property
    def _arguments(self) -> ForwardArguments:
        return ForwardArguments(self.base, [])


class Batches(Sequence[dict[str, Any]]):
    """Batches of examples for a prepared model, made when they are asked for."""

    def __init__(self, prepared: PreparedModel, examples: Sequence[Example], batch_size: int) -> None:
        self.prepared, self.parts = prepared, in_parts(examples, batch_size)

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, number: Any) -> Any:
        """Return the batch of that number, or the list of those of a slice."""
        if isinstance(number, slice):
            return [self[i] for i in range(*number.indices(len(self)))]
        return self.prepared.batch(self.parts[number])


def texts_of(texts: Iterable[Text] | None) -> Iterable[Text] | None:
    """Return an array or a column of a table as a list, and other texts as they are.

    Raises `InvalidInputError` for what cannot be iterated over, and for a table or mapping as a whole, which would be
    read as the names of its columns.
    """
    if texts is not None and not isinstance(texts, Iterable):
        raise invalid("texts", "be strings or pairs of strings, in a list or one after the other", texts)
    if is_table(texts):
        raise invalid("texts", "be one column of a table", type(texts).__name__, how_to_choose(texts))
    return list(texts) if hasattr(texts, "__array__") and isinstance(texts, Iterable) else texts


def listed_examples(texts: Any, inputs: Any) -> Sequence[Example]:
    """Return texts that must be a list, or the rows of `inputs`, shape by shape.

    Raises what `examples_of` and `texts_of` raise.
    """
    found: Any = texts_of(texts)
    return by_form(examples_of(found, inputs))


def is_pair(examples: Sequence[Any]) -> bool:
    """Whether each of the examples is a pair of strings."""
    return len(examples) > 0 and not isinstance(examples[0], str | Row)


def check_reads_texts(model: nn.Module) -> None:
    """Raise `InvalidInputError` for a model whose base takes no token ids, such as one of images or speech."""
    base = base_of(model)
    if "input_ids" not in inspect.signature(base.forward).parameters:
        raise InvalidInputError(f"{type(base).__name__} takes `{base.main_input_name}` and no texts; give `inputs`")


def own_tokenizer(model: nn.Module) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a SentenceTransformer, or of a model that was loaded by name."""
    inner = transformer_of(model)
    if inner is not model and isinstance(found := getattr(model, "tokenizer", None), PreTrainedTokenizerBase):
        return found
    name = original_name(inner)
    if not name:
        raise InvalidInputError("`tokenizer` must be given for a model that was not loaded by name")
    return load_tokenizer(name)
