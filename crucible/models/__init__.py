"""What a model is: a decoder as pure functions, LoRA, tokenizers, loading, sampling."""

from crucible.models.decoder import TINY, Decoder, DecoderConfig, RopeScaling, decoder
from crucible.models.load import Loaded, load, load_config, load_params, load_tokenizer
from crucible.models.lora import Lora, LoraConfig, attach, init_lora, merge_lora
from crucible.models.sample import generate
from crucible.models.tokenizers import (
    ByteTokenizer,
    HFTokenizer,
    Tokenizer,
    tokenizer_from_file,
)

__all__ = [
    "TINY",
    "ByteTokenizer",
    "Decoder",
    "DecoderConfig",
    "HFTokenizer",
    "Loaded",
    "Lora",
    "LoraConfig",
    "RopeScaling",
    "Tokenizer",
    "attach",
    "decoder",
    "generate",
    "init_lora",
    "load",
    "load_config",
    "load_params",
    "load_tokenizer",
    "merge_lora",
    "tokenizer_from_file",
]
