"""Read pre-trained Llama models: a Hugging Face directory or a `.gguf` file.

Only local files, and only formats that hold data: pickle files, which can run code, are refused.
What the decoder cannot do is an error before any weight is read.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from crucible.models.decoder import DecoderConfig, RopeScaling, decoder
from crucible.models.tokenizers import Tokenizer, tokenizer_from_file, tokenizer_from_gguf

__all__ = ["Loaded", "load", "load_config", "load_params", "load_tokenizer"]

SHOWN = 10  # names listed in an error
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


class Loaded(NamedTuple):
    """A pre-trained model: `decoder(config).apply(params, tokens)` gives its logits."""

    config: DecoderConfig
    params: dict[str, Any]
    tokenizer: Tokenizer


def load(path: str | Path, *, dtype: str = "float32") -> Loaded:
    """Read a model's shape, weights and tokenizer.

    Weights are read one leaf at a time, so that peak memory is the model and its largest leaf.

    Args:
        path: a Hugging Face directory (`config.json`, `model.safetensors` or its shards,
            `tokenizer.json`), or a `.gguf` file, whose quantised weights are expanded.
        dtype: what the params are held in: float32, bfloat16 or float16. What blocks compute in is
            `config.dtype`, float32 here; `dataclasses.replace` changes it.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: the decoder cannot run this model, or the weights do not fit its shape; says
            which key or which tensors.
        ImportError: an optional library is missing; says how to install it.

    Example:
        ::

            config, params, tokenizer = load("SmolLM2-135M-Instruct.Q4_1.gguf")
            logits = decoder(config).apply(params, jnp.array([tokenizer.encode("Hello")]))
    """
    config, tokenizer = load_config(path), load_tokenizer(path)
    return Loaded(config, load_params(path, dtype=dtype), tokenizer)


def load_params(path: str | Path, *, dtype: str = "float32") -> dict[str, Any]:
    """Read a model's weights only; arguments and errors as for `load`."""
    if dtype not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"dtype={dtype!r} must be 'float32', 'bfloat16' or 'float16'.")
    path = _checked(path)
    with ExitStack() as open_files:
        if path.is_dir():
            config, weights = load_config(path), _open_safetensors(path, open_files)
        else:
            reader = _open_gguf(path)
            config = _gguf_config(path, reader)
            weights = _gguf_weights(path, reader, config)
        return _read_params(weights, config, jnp.dtype(dtype))


def load_config(path: str | Path) -> DecoderConfig:
    """Read a model's shape only, and no weights.

    Raises:
        FileNotFoundError: the file, or the directory's `config.json`, is missing.
        ValueError: the decoder cannot run this model; names each key and its value.
    """
    path = _checked(path)
    if path.is_dir():
        return _hf_config(path / "config.json", _read_json(path / "config.json"))
    return _gguf_config(path, _open_gguf(path))


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Read a model's tokenizer only.

    Raises:
        FileNotFoundError: the file, or the directory's `tokenizer.json`, is missing.
        ImportError: an optional library is missing; says how to install it.
        ValueError: it is of a kind that is not known here, or has ids that the model has not.
    """
    path, config = _checked(path), load_config(path)
    if path.is_dir():
        tokenizer = tokenizer_from_file(path)
    else:
        tokenizer = tokenizer_from_gguf(_gguf_values(_open_gguf(path), "tokenizer."))
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(
            f"{path}: the tokenizer's ids go up to {tokenizer.vocab_size - 1}, past the "
            f"embedding's {config.vocab_size} rows (vocab_size). Resize the model to fit."
        )
    return tokenizer


def _checked(path: str | Path) -> Path:
    path = Path(path).expanduser()
    if not path.exists():
        raise FileNotFoundError(
            f"{path} does not exist. Only local files are read: download the model first, "
            "e.g. with `hf download OWNER/NAME --local-dir DIRECTORY`."
        )
    if path.is_dir() or path.suffix == ".gguf":
        return path
    if path.suffix in PICKLES:
        raise ValueError(_pickle_refusal(path.parent, [path.name]))
    raise ValueError(f"{path} is neither a directory with a config.json nor a .gguf file.")


def _pickle_refusal(directory: Path, names: list[str]) -> str:
    return (
        f"{directory} holds its weights in {_some(names)}: pickle files can run code. Convert to "
        "safetensors: AutoModelForCausalLM.from_pretrained(path).save_pretrained(path)."
    )


def _some(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


class _Weights(NamedTuple):
    """Named tensors of one model, not read yet."""

    where: Path
    names: Mapping[str, str]  # leaf -> tensor name, with {} for the layer
    shapes: Mapping[str, tuple[int, ...]]  # of every tensor there is, as stored
    read: Callable[[str], np.ndarray]


NAMES = {  # leaf: (Hugging Face's name, GGUF's)
    "embed": ("model.embed_tokens.weight", "token_embd.weight"),
    "attention_norm": ("model.layers.{}.input_layernorm.weight", "blk.{}.attn_norm.weight"),
    "query": ("model.layers.{}.self_attn.q_proj.weight", "blk.{}.attn_q.weight"),
    "key": ("model.layers.{}.self_attn.k_proj.weight", "blk.{}.attn_k.weight"),
    "value": ("model.layers.{}.self_attn.v_proj.weight", "blk.{}.attn_v.weight"),
    "output": ("model.layers.{}.self_attn.o_proj.weight", "blk.{}.attn_output.weight"),
    "mlp_norm": ("model.layers.{}.post_attention_layernorm.weight", "blk.{}.ffn_norm.weight"),
    "gate": ("model.layers.{}.mlp.gate_proj.weight", "blk.{}.ffn_gate.weight"),
    "up": ("model.layers.{}.mlp.up_proj.weight", "blk.{}.ffn_up.weight"),
    "down": ("model.layers.{}.mlp.down_proj.weight", "blk.{}.ffn_down.weight"),
    "final_norm": ("model.norm.weight", "output_norm.weight"),
    "head": ("lm_head.weight", "output.weight"),
}


def _read_params(weights: _Weights, config: DecoderConfig, dtype: Any) -> dict[str, Any]:
    template = jax.eval_shape(decoder(config).init, jax.random.key(0))
    layers, names = template.pop("layers"), weights.names
    expected = {names[leaf]: like.shape for leaf, like in template.items()}
    for leaf, like in layers.items():  # one tensor per layer; matrices are output-first in files
        expected |= {names[leaf].format(i): like.shape[:0:-1] for i in range(config.layers)}
    _check_tensors(weights, config, expected)

    def stacked(leaf: str, shape: tuple[int, ...]) -> jax.Array:
        stack = np.empty(shape, dtype)
        for layer in range(config.layers):
            stack[layer] = weights.read(names[leaf].format(layer)).T
        return jnp.asarray(stack)

    params: dict[str, Any] = {
        leaf: jnp.asarray(weights.read(names[leaf]).astype(dtype, copy=False)) for leaf in template
    }
    return params | {"layers": {leaf: stacked(leaf, like.shape) for leaf, like in layers.items()}}


def _check_tensors(weights: _Weights, config: DecoderConfig, expected: Mapping[str, Any]) -> None:
    """Raise a ValueError that names every tensor missing, misshapen or left over."""
    found = {n: s for n, s in weights.shapes.items() if not n.endswith("rotary_emb.inv_freq")}
    head, embed = weights.names["head"], weights.names["embed"]
    if config.tied_head and head in found and found[head] == found.get(embed):
        del found[head]  # older files store the shared matrix twice
        if not np.array_equal(weights.read(head), weights.read(embed)):
            raise ValueError(
                f"{weights.where} says tie_word_embeddings=True, but {head} differs from {embed}. "
                "Set tie_word_embeddings to false in config.json to use both."
            )
    misshapen = [name for name in expected if name in found and found[name] != expected[name]]
    problems = {
        "missing": [name for name in expected if name not in found],
        "of the wrong shape": [f"{n} {found[n]} where {expected[n]} is due" for n in misshapen],
        "not part of this model": [name for name in found if name not in expected],
    }
    told = [f"{len(names)} {what}: {_some(names)}" for what, names in problems.items() if names]
    if told:
        raise ValueError(
            f"The tensors in {weights.where} do not fit its configuration. {'; '.join(told)}."
        )


# What a file may say about these keys; None is an absent key.
HF_ALLOWED = {
    "model_type": ("llama",),
    "architectures": (None, ["LlamaForCausalLM"]),
    "hidden_act": (None, "silu"),
    "attention_bias": (None, False),
    "mlp_bias": (None, False),
    "quantization_config": (None,),
    "rope_type": ("default", "llama3"),
    "partial_rotary_factor": (None, 1.0),
}
GGUF_ALLOWED = {
    "general.architecture": ("llama",),
    "llama.rope.scaling.type": (None, "none"),
    "llama.rope.scale_linear": (None, 1.0),
    "llama.attention.sliding_window": (None, 0),
    "llama.attention.causal": (None, True),
    "llama.expert_count": (None, 0),
}
GGUF_KEYS = {  # config.json's key: GGUF's
    "hidden_size": "llama.embedding_length",
    "num_hidden_layers": "llama.block_count",
    "num_attention_heads": "llama.attention.head_count",
    "intermediate_size": "llama.feed_forward_length",
    "vocab_size": "llama.vocab_size",
    "num_key_value_heads": "llama.attention.head_count_kv",
    "head_dim": "llama.attention.key_length",
    "rms_norm_eps": "llama.attention.layer_norm_rms_epsilon",
    "rope_theta": "llama.rope.freq_base",
}
GGUF_OPTIONAL = ("num_key_value_heads", "head_dim", "rope_theta")


def _hf_config(file: Path, values: Mapping[str, Any]) -> DecoderConfig:
    rope = {"rope_theta": values.get("rope_theta") or 10_000.0}
    # transformers 5 writes rope_parameters, older versions rope_theta and rope_scaling
    rope |= (values.get("rope_parameters") or {}) | (values.get("rope_scaling") or {})
    rope["rope_type"] = rope.get("rope_type") or rope.get("type") or "default"
    _refuse(file, {**values, **rope}, HF_ALLOWED)
    scaling = None
    if rope["rope_type"] == "llama3":
        rope.setdefault("original_max_position_embeddings", values.get("max_position_embeddings"))
        names = {
            "factor": "factor",
            "low_frequency_factor": "low_freq_factor",
            "high_frequency_factor": "high_freq_factor",
            "original_max_length": "original_max_position_embeddings",
        }
        scaling = RopeScaling(**_renamed(file, rope, names))
    names = {
        "vocab_size": "vocab_size",
        "width": "hidden_size",
        "layers": "num_hidden_layers",
        "heads": "num_attention_heads",
        "mlp_width": "intermediate_size",
    }
    shape = _renamed(file, values, names)
    fields = {
        "kv_heads": values.get("num_key_value_heads") or shape["heads"],
        "head_dim": values.get("head_dim"),
        "rope_theta": float(rope["rope_theta"]),
        "rope_scaling": scaling,
        "norm_epsilon": values.get("rms_norm_eps", 1e-6),
        "tied_head": bool(values.get("tie_word_embeddings", False)),
    }
    try:
        return DecoderConfig(**shape, **fields)
    except ValueError as error:
        raise ValueError(f"{file} describes no decoder: {error}") from error


def _refuse(file: Path, values: Mapping[str, Any], allowed: Mapping[Any, tuple]) -> None:
    told = [
        f"{key}={values.get(key)!r:.80} "
        f"(only {' or '.join(repr(v) for v in good if v is not None) or 'without it'})"
        for key, good in allowed.items()
        if not any(values.get(key) == value for value in good)
    ]
    if told:
        raise ValueError(f"{file} asks for what the decoder cannot do: {_some(told)}.")


def _renamed(file: Path, values: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    missing = [name for name in names.values() if values.get(name) is None]
    if missing:
        raise ValueError(f"{file} lacks {_some(missing)}.")
    return {ours: values[theirs] for ours, theirs in names.items()}


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        ggufs = [f.name for f in file.parent.glob("*.gguf")]
        hint = f" It holds {_some(ggufs)}: give that file's path." if ggufs else ""
        raise FileNotFoundError(f"{file.parent} has no {file.name}.{hint}")
    try:
        return dict(json.loads(file.read_text("utf-8")))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file} is not a JSON object: {error}.") from error


def _open_safetensors(directory: Path, open_files: ExitStack) -> _Weights:
    try:
        from safetensors import safe_open
    except ImportError as error:
        raise ImportError("safetensors is missing: pip install 'crucible-jax[hf]'.") from error

    homes, shapes, refused = {}, {}, []
    for file in _shards(directory):
        try:
            tensors = open_files.enter_context(safe_open(file, framework="numpy"))
        except Exception as error:  # the library raises Exception's own child
            raise ValueError(_damaged(file, error)) from error
        for name in tensors.keys():  # noqa: SIM118, since it is no mapping
            part = tensors.get_slice(name)
            homes[name], shapes[name] = tensors, tuple(part.get_shape())
            if part.get_dtype() not in ("F64", "F32", "F16", "BF16"):
                refused.append(f"{name} {part.get_dtype()}")
    if refused:
        raise ValueError(
            f"{directory} holds tensors that are not floating-point numbers of 16 bits or more: "
            f"{_some(refused)}. Quantised weights must be expanded first."
        )
    names = {leaf: hf for leaf, (hf, _) in NAMES.items()}
    return _Weights(directory, names, shapes, lambda name: homes[name].get_tensor(name))


def _shards(directory: Path) -> list[Path]:
    single, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        pickles = sorted(f.name for f in directory.iterdir() if f.suffix in PICKLES)
        if pickles:
            raise ValueError(_pickle_refusal(directory, pickles))
        raise FileNotFoundError(f"{directory} has neither {single.name} nor {index.name}.")
    names = sorted(set(_read_json(index).get("weight_map", {}).values()))
    absent = [name for name in names if not (directory / name).is_file()]
    if absent:
        raise FileNotFoundError(f"{directory} lacks {_some(absent)}, which {index.name} names.")
    return [directory / name for name in names]


def _damaged(file: Path, error: Exception) -> str:
    return (
        f"{file} ({file.stat().st_size:,} bytes) is damaged or cut short: {error}. Download it "
        "again; where it is a git-lfs pointer of some hundred bytes, run `git lfs pull`."
    )


def _open_gguf(file: Path) -> Any:
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise ImportError("gguf is missing: pip install 'crucible-jax[smollm2]'.") from error
    stat = file.stat()
    return _gguf_reader(file, stat.st_mtime_ns, stat.st_size)


@lru_cache(maxsize=1)  # it takes a second, and the shape, the tokenizer and the weights need it
def _gguf_reader(file: Path, modified: int, size: int) -> Any:
    from gguf import GGUFReader

    class Reader(GGUFReader):
        """Slices a plain array: slicing a memory map is slow (SmolLM2: 0.9 s instead of 2.5)."""

        @property
        def data(self):
            return self._data

        @data.setter
        def data(self, mapped):
            self._data = np.asarray(mapped)

    try:
        return Reader(file)
    except Exception as error:  # what a short file raises depends on where it ends
        raise ValueError(_damaged(file, error)) from error


def _gguf_values(reader: Any, prefix: str) -> dict[str, Any]:
    return {k: field.contents() for k, field in reader.fields.items() if k.startswith(prefix)}


def _gguf_config(file: Path, reader: Any) -> DecoderConfig:
    """Check what GGUF says in its own words, then say it in config.json's."""
    said = _gguf_values(reader, "general.") | _gguf_values(reader, "llama.")
    _refuse(file, said, GGUF_ALLOWED)
    if "tokenizer.ggml.tokens" in reader.fields:  # older files leave out their size
        said.setdefault("llama.vocab_size", len(reader.fields["tokenizer.ggml.tokens"].data))
    values = _renamed(file, said, {k: v for k, v in GGUF_KEYS.items() if k not in GGUF_OPTIONAL})
    values |= {k: said[GGUF_KEYS[k]] for k in GGUF_OPTIONAL if GGUF_KEYS[k] in said}
    names = {tensor.name for tensor in reader.tensors}
    values |= {"model_type": "llama", "tie_word_embeddings": NAMES["head"][1] not in names}
    config = _hf_config(file, values)
    sizes = ("llama.rope.dimension_count", "llama.attention.value_length")
    _refuse(file, said, dict.fromkeys(sizes, (None, config.head_size)))
    return config


def _gguf_weights(file: Path, reader: Any, config: DecoderConfig) -> _Weights:
    import gguf

    tensors = {tensor.name: tensor for tensor in reader.tensors}

    def read(name: str) -> np.ndarray:
        tensor = tensors[name]
        try:
            values = gguf.dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError as error:
            raise ValueError(f"{file}: {name} cannot be expanded: {error}.") from error
        if ".attn_q." in name or ".attn_k." in name:
            # llama.cpp rotates pairs (2i, 2i + 1) of a head where Hugging Face rotates (i, i + K/2)
            pairs = values.reshape(-1, config.head_size // 2, 2, config.width)
            values = pairs.swapaxes(1, 2).reshape(values.shape)
        return values

    shapes = {name: tuple(int(n) for n in reversed(t.shape)) for name, t in tensors.items()}
    return _Weights(file, {leaf: name for leaf, (_, name) in NAMES.items()}, shapes, read)
