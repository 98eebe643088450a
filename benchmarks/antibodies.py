"""Models of antibody sequences that install from PyPI, and antibodies made by rule for them to read.

    pip install --no-deps antiberty==0.1.3 sapiens==1.0.3

Later releases of both fetch their weights over the network. AntiBERTy (MIT): a BERT of 8 layers x 8 heads, 512 wide
(Ruffolo et al. 2021, arXiv 2112.07782). Sapiens (MIT): two RoBERTas of 4 layers x 8 heads, 128 wide, for heavy and for
light chains (Prihoda et al. 2022), saved by fairseq, whose names are turned into those of transformers here.

The sequences are human germline segments (IMGT reference) joined at random, with a random loop where the segments
meet and a few residues exchanged: antibodies in form, of no donor.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast, RobertaConfig, RobertaModel

RESIDUES = "ACDEFGHIKLMNPQRSTVWY"
HEAVY = [
    "QVQLVQSGAEVKKPGASVKVSCKASGYTFTGYYMHWVRQAPGQGLEWMGWINPNSGGTNYAQKFQGRVTMTRDTSISTAYMELSRLRSDDTAVYYCAR",
    "QVQLVQSGAEVKKPGSSVKVSCKASGGTFSSYAISWVRQAPGQGLEWMGGIIPIFGTANYAQKFQGRVTITADESTSTAYMELSSLRSEDTAVYYCAR",
    "EVQLLESGGGLVQPGGSLRLSCAASGFTFSSYAMSWVRQAPGKGLEWVSAISGSGGSTYYADSVKGRFTISRDNSKNTLYLQMNSLRAEDTAVYYCAK",
    "QVQLVESGGGVVQPGRSLRLSCAASGFTFSSYGMHWVRQAPGKGLEWVAVISYDGSNKYYADSVKGRFTISRDNSKNTLYLQMNSLRAEDTAVYYCAK",
    "QVQLQQWGAGLLKPSETLSLTCAVYGGSFSGYYWSWIRQPPGKGLEWIGEINHSGSTNYNPSLKSRVTISVDTSKNQFSLKLSSVTAADTAVYYCAR",
    "EVQLVQSGAEVKKPGESLKISCKGSGYSFTSYWIGWVRQMPGKGLEWMGIIYPGDSDTRYSPSFQGQVTISADKSISTAYLQWSSLKASDTAMYYCAR",
]
HEAVY_ENDS = ["YFDYWGQGTLVTVSS", "DAFDIWGQGTMVTVSS", "YYGMDVWGQGTTVTVSS", "WFDPWGQGTLVTVSS"]
LIGHT = [
    "DIQMTQSPSSLSASVGDRVTITCRASQSISSYLNWYQQKPGKAPKLLIYAASSLQSGVPSRFSGSGSGTDFTLTISSLQPEDFATYYCQQSYSTP",
    "EIVLTQSPGTLSLSPGERATLSCRASQSVSSSYLAWYQQKPGQAPRLLIYGASSRATGIPDRFSGSGSGTDFTLTISRLEPEDFAVYYCQQYGSSP",
    "EIVLTQSPATLSLSPGERATLSCRASQSVSSYLAWYQQKPGQAPRLLIYDASNRATGIPARFSGSGSGTDFTLTISSLEPEDFAVYYCQQRSNWP",
    "DIVMTQSPDSLAVSLGERATINCKSSQSVLYSSNNKNYLAWYQQKPGQPPKLLIYWASTRESGVPDRFSGSGSGTDFTLTISSLQAEDVAVYYCQQYYSTP",
]
LIGHT_ENDS = ["WTFGQGTKVEIK", "YTFGQGTKLEIK", "LTFGGGTKVEIK", "FTFGPGTKVDIK"]


def antibodies(chain: str, count: int = 2000, seed: int = 0) -> list[str]:
    """Return that many `heavy` or `light` chains."""
    draw = random.Random(f"{chain} {seed}")
    starts, ends = (HEAVY, HEAVY_ENDS) if chain == "heavy" else (LIGHT, LIGHT_ENDS)
    made = []
    for _ in range(count):
        loop = "".join(draw.choices(RESIDUES, k=draw.randint(2, 12) if chain == "heavy" else draw.randint(0, 2)))
        residues = list(draw.choice(starts) + loop + draw.choice(ends))
        for place in draw.sample(range(len(residues)), draw.randint(0, 10)):
            residues[place] = draw.choice(RESIDUES)
        made.append("".join(residues))
    return made


def antiberty(package: Path) -> tuple[BertModel, PreTrainedTokenizerFast]:
    """Load AntiBERTy's encoder from the installed package's folder."""
    folder = package / "trained_models"
    config = BertConfig.from_pretrained(folder / "AntiBERTy_md_smooth")
    model = BertModel.from_pretrained(folder / "AntiBERTy_md_smooth", config=config, add_pooling_layer=False)
    return model.eval(), _tokenizer((folder / "vocab.txt").read_text().split("\n"), "[CLS]", "[SEP]", "[PAD]", "[UNK]")


def sapiens(package: Path, chain: str) -> tuple[RobertaModel, PreTrainedTokenizerFast]:
    """Load the encoder of the `heavy` or `light` chains from the installed package's folder."""
    file = package / "models" / "v1" / f"checkpoint_v{chain[0]}.pt"
    with torch.serialization.safe_globals([argparse.Namespace]):
        saved = torch.load(file, map_location="cpu", weights_only=True)
    about = saved["args"]
    tokens = ["<s>", "<pad>", "</s>", "<unk>", *RESIDUES, "<mask>"]  # fairseq's order
    config = RobertaConfig(
        vocab_size=len(tokens), hidden_size=about.encoder_embed_dim, num_hidden_layers=about.encoder_layers,
        num_attention_heads=about.encoder_attention_heads, intermediate_size=about.encoder_ffn_embed_dim,
        max_position_embeddings=about.max_positions + 2, type_vocab_size=1, layer_norm_eps=1e-5,
    )  # fmt: skip
    model = RobertaModel(config, add_pooling_layer=False)
    weights = {_renamed(name): value for name, value in saved["model"].items() if ".sentence_encoder." in name}
    # RoBERTa of fairseq knows no token types.
    weights["embeddings.token_type_embeddings.weight"] = torch.zeros(1, config.hidden_size)
    model.load_state_dict(weights)
    return model.eval(), _tokenizer(tokens, "<s>", "</s>", "<pad>", "<unk>")


def _renamed(name: str) -> str:
    """Return what transformers calls a weight of fairseq's encoder."""
    name = name.removeprefix("decoder.sentence_encoder.")
    for theirs, ours in {
        "embed_tokens": "embeddings.word_embeddings",
        "embed_positions": "embeddings.position_embeddings",
        "emb_layer_norm": "embeddings.LayerNorm",
        "self_attn_layer_norm": "attention.output.LayerNorm",
        "self_attn.out_proj": "attention.output.dense",
        "self_attn.k_proj": "attention.self.key",
        "self_attn.q_proj": "attention.self.query",
        "self_attn.v_proj": "attention.self.value",
        "fc1": "intermediate.dense",
        "fc2": "output.dense",
        "final_layer_norm": "output.LayerNorm",
    }.items():
        name = name.replace(theirs, ours)
    return f"encoder.layer.{name.removeprefix('layers.')}" if name.startswith("layers.") else name


def _tokenizer(tokens: list[str], first: str, last: str, padding: str, unknown: str) -> PreTrainedTokenizerFast:
    """Make a tokenizer of single residues."""
    ids: dict[str, int] = {token: number for number, token in enumerate(tokens) if token}
    inner: Any = Tokenizer(models.WordLevel(ids, unk_token=unknown))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    ends = [(token, ids[token]) for token in (first, last)]
    inner.post_processor = processors.TemplateProcessing(single=f"{first} $A {last}", special_tokens=ends)
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token=padding, unk_token=unknown, cls_token=first, sep_token=last,
        model_max_length=144,
    )  # fmt: skip
