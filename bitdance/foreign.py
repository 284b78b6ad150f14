"""The one door between a model folder that anyone may have made and transformers.

No key of a config reaches the library unless it is on a list here, no code of a folder is run, nothing is downloaded, and
nothing behind a link that leaves the folder is read. transformers never sees the folder itself: it gets a temporary one
with our copies of the small files, cut down to the lists, and links to the weights.
"""

import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bitdance.tokenizer_file import ADDED, check_tokenizer
from bitdance.values import Range, shown
from lfq_tokenizer import limits
from lfq_tokenizer.files import check_links
from lfq_tokenizer.json_file import parse_json, read_json, write_json
from lfq_tokenizer.text import listed

_COUNT = Range(1, limits.WIDTH)
_MAYBE = Range(0, limits.WIDTH)
_FACTOR = Range(0, 1e6, whole=False, open_low=True)
_SHARE = Range(0, 1, whole=False)
# key of config.json → what is allowed beside null: a range, or one of these kinds
LM_KEYS: dict[str, Range | type | tuple[type, ...]] = {
    "hidden_size": _COUNT,
    "intermediate_size": Range(1, 1 << 24),
    "num_hidden_layers": Range(1, limits.LAYERS),
    "num_attention_heads": Range(1, 1 << 14),
    "num_key_value_heads": Range(1, 1 << 14),
    "head_dim": Range(1, 1 << 14),
    "vocab_size": Range(1, 1 << 24),
    "max_position_embeddings": Range(1, 1 << 31),
    "original_max_position_embeddings": Range(1, 1 << 31),
    "max_window_layers": _MAYBE,
    "sliding_window": _MAYBE,
    "no_rope_layer_interval": _MAYBE,
    "pretraining_tp": Range(1, 1 << 10),
    "rms_norm_eps": Range(0, 1, whole=False, open_low=True),
    "layer_norm_eps": Range(0, 1, whole=False, open_low=True),
    "norm_eps": Range(0, 1, whole=False, open_low=True),
    "initializer_range": Range(0, 100, whole=False),
    "rope_theta": Range(0, 1e12, whole=False, open_low=True),
    "partial_rotary_factor": _SHARE,
    "attention_dropout": _SHARE,
    "embd_pdrop": _SHARE,
    "resid_pdrop": _SHARE,
    "attention_multiplier": _FACTOR,
    "embedding_multiplier": _FACTOR,
    "residual_multiplier": _FACTOR,
    "logits_scaling": _FACTOR,
    "logit_scale": _FACTOR,
    "query_pre_attn_scalar": _FACTOR,
    "final_logit_softcapping": _FACTOR,
    "attn_logit_softcapping": _FACTOR,
    "bos_token_id": (int, list),
    "eos_token_id": (int, list),
    "pad_token_id": int,
    "hidden_act": str,
    "hidden_activation": str,
    "attention_bias": bool,
    "mlp_bias": bool,
    "use_sliding_window": bool,
    "use_bidirectional_attention": (bool, str),
    "tie_word_embeddings": bool,
    "use_cache": bool,
    "use_qk_norm": bool,
    "layer_types": list,
    "no_rope_layers": list,
    "rope_parameters": dict,
    "rope_scaling": dict,
    # mixtures of experts
    "num_experts": _COUNT,
    "num_local_experts": _COUNT,
    "num_experts_per_tok": _COUNT,
    "moe_intermediate_size": Range(1, 1 << 24),
    "decoder_sparse_step": _MAYBE,
    "mlp_only_layers": list,
    "norm_topk_prob": bool,
    "output_router_logits": bool,
    "router_aux_loss_coef": Range(0, 1e6, whole=False),
}
# The same of the text encoders of the T5 family.
T5_KEYS: dict[str, Range | type | tuple[type, ...]] = {
    **dict.fromkeys(("d_model", "d_kv", "num_heads", "num_layers"), _COUNT),
    "d_ff": Range(1, 1 << 24),
    "vocab_size": Range(1, 1 << 24),
    "relative_attention_num_buckets": Range(1, 1 << 16),
    "relative_attention_max_distance": Range(1, 1 << 20),
    "layer_norm_epsilon": Range(0, 1, whole=False, open_low=True),
    "dropout_rate": _SHARE,
    "feed_forward_proj": str,
    "dense_act_fn": str,
    "is_gated_act": bool,
    "eos_token_id": int,
    "pad_token_id": int,
}
ROPE_KEYS = {
    *("rope_type", "type", "rope_theta", "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    *("partial_rotary_factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    *("long_factor", "short_factor"),
}
# key of tokenizer_config.json and special_tokens_map.json → kinds
TOKENIZER_KEYS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("pad_token", "eos_token", "bos_token", "unk_token", "sep_token", "cls_token", "mask_token"), (str, dict)),
    **dict.fromkeys(("add_bos_token", "add_eos_token", "add_prefix_space", "clean_up_tokenization_spaces"), (bool,)),
    **dict.fromkeys(("split_special_tokens", "legacy", "spaces_between_special_tokens"), (bool,)),
    **dict.fromkeys(("tokenizer_class", "backend", "errors", "padding_side", "truncation_side"), (str,)),
    **dict.fromkeys(("additional_special_tokens", "extra_special_tokens"), (list, dict)),
    "chat_template": (str, list),
    "model_max_length": (int, float),
    "added_tokens_decoder": (dict,),
}
_TOKEN_KEYS = ("content", "lstrip", "normalized", "rstrip", "single_word", "special", "id", "__type")
GENERATION_KEYS = (
    *("bos_token_id", "eos_token_id", "pad_token_id", "do_sample", "temperature", "top_k", "top_p", "min_p"),
    *("repetition_penalty", "max_length", "max_new_tokens"),
)
_TEXT_FILES = (
    *("vocab.json", "merges.txt", "vocab.txt", "added_tokens.json", "tokenizer.model", "spiece.model", "chat_template.jinja"),
)
_CLASS = re.compile(r"[A-Za-z0-9_]{1,80}")
_TOKEN_NAME = re.compile(r"[a-z][a-z0-9_]{0,60}_token")


def lm_fields(values: Any, keys: Mapping[str, Range | type | tuple[type, ...]] = LM_KEYS) -> tuple[str, dict[str, Any]]:
    """(model_type, fields on our list) of a backbone's config. ValueError for a value out of its range, a config that
    asks for code or holds quantised weights. Keys that no list names are left out; `build_config` refuses those that its
    family would heed. `keys`: the list, where it is not that of language models."""
    if not isinstance(values, Mapping) or not isinstance(values.get("model_type"), str):
        raise ValueError('a backbone config needs "model_type", for instance "qwen3"')
    if "auto_map" in values:
        raise ValueError("this backbone config asks to run code of its own (auto_map), which is refused")
    if values.get("quantization_config") is not None:
        raise ValueError("the weights are quantised (quantization_config); give the original ones (--quantize makes them small)")
    fields = {}
    for name, allowed in keys.items():
        if name not in values:
            continue
        value = values[name]
        if isinstance(allowed, Range):
            value = None if value is None else allowed.check(name, value)
        elif value is not None:
            _check_kind(name, value, allowed)
        if name in ("rope_parameters", "rope_scaling") and value is not None:
            value = {key: content for key, content in value.items() if key in ROPE_KEYS}
        fields[name] = value
    return values["model_type"], fields


def build_config(values: Any) -> Any:
    """A transformers config from a config's dictionary. ValueError names what is wrong, whatever the library raised."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind, fields = lm_fields(values)
    try:
        family = CONFIG_MAPPING[kind]
    except KeyError:
        raise ValueError(f'model_type {shown(kind)} is no family that transformers knows; Qwen3 is "qwen3"') from None
    own = set(getattr(family, "__dataclass_fields__", {})) - set(_base_fields())
    if unknown := sorted(name for name in own & set(values) - set(LM_KEYS) if values[name] is not None):
        known = ", ".join(LM_KEYS)
        raise ValueError(f"a backbone of family {kind!r} with {listed(unknown)} is not supported; known keys: {known}")
    try:
        return family(**fields)
    except Exception as error:  # the libraries raise many kinds
        raise ValueError(f"backbone config with model_type {kind!r} was refused: {_first_line(error)}") from error


def encoder_config(values: Any) -> Any:
    """A transformers config of a T5 text encoder ("umt5" or "t5"). ValueError names what is wrong."""
    from transformers import T5Config, UMT5Config

    kind, fields = lm_fields(values, T5_KEYS)
    families = {"umt5": UMT5Config, "t5": T5Config}
    if kind not in families:
        raise ValueError(f"model_type {shown(kind)} is no text encoder that is known; known are {', '.join(families)}")
    try:
        return families[kind](**{name: value for name, value in fields.items() if value is not None})
    except Exception as error:  # the libraries raise many kinds
        raise ValueError(f"text encoder config with model_type {kind!r} was refused: {_first_line(error)}") from error


def load_text_tokenizer(folder: Path | str) -> Any:
    """The text tokenizer of a folder. ValueError names the folder; no code of it is run, and nothing is downloaded."""
    from transformers import AutoTokenizer

    folder = Path(folder)
    try:
        path = folder / "tokenizer.json"
        if path.is_file():
            check_tokenizer(read_json(path), path)
        with view(folder, weights=False) as safe, panics_are_errors():
            tokenizer = AutoTokenizer.from_pretrained(str(safe), local_files_only=True, trust_remote_code=False)
        if not path.is_file() and (made := getattr(tokenizer, "backend_tokenizer", None)):  # of files that may ask for the same
            check_tokenizer(parse_json(made.to_str(), folder), folder)
    except Exception as error:  # transformers and tokenizers raise many kinds, some of them plain Exception
        raise ValueError(f"the text tokenizer in {folder} could not be read ({_first_line(error)}); download it again") from error
    tokenizer.name_or_path = str(folder)
    return tokenizer


@contextmanager
def panics_are_errors() -> Iterator[None]:
    """A panic of a library in Rust, which is no `Exception`, becomes a ValueError."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"the library gave up: {_first_line(error)}") from error


@contextmanager
def view(folder: Path, weights: bool = True) -> Iterator[Path]:
    """A temporary folder with what transformers may see of `folder`: configs cut down to our lists, the files of the text
    tokenizer and, with `weights`, links to the backbone's files."""
    check_links(folder)
    with tempfile.TemporaryDirectory(prefix="bitdance-") as name:
        safe = Path(name)
        if (folder / "config.json").is_file():
            kind, fields = lm_fields(read_json(folder / "config.json")) if weights else (_model_type(folder), {})
            write_json({"model_type": kind, **fields} if _CLASS.fullmatch(kind) else {}, safe / "config.json")
        if (folder / "generation_config.json").is_file():
            said = read_json(folder / "generation_config.json")
            if not isinstance(said, dict):
                raise ValueError(f"{folder / 'generation_config.json'} holds a {type(said).__name__}; expected a JSON object")
            write_json({key: said[key] for key in GENERATION_KEYS if key in said}, safe / "generation_config.json")
        for file in ("tokenizer_config.json", "special_tokens_map.json"):
            if (folder / file).is_file():
                write_json(_tokenizer_fields(read_json(folder / file), folder / file), safe / file)
        for file in ("tokenizer.json", *_TEXT_FILES):
            if (folder / file).is_file():
                shutil.copyfile(folder / file, safe / file)
        for path in folder.glob("model*.safetensors*") if weights else ():
            (safe / path.name).symlink_to(path.resolve())
        yield safe


def _tokenizer_fields(values: Any, source: Path) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise ValueError(f"{source} holds a {type(values).__name__}; expected a JSON object")
    fields = {}
    for name, kinds in TOKENIZER_KEYS.items():
        if (value := values.get(name)) is None:
            continue
        _check_kind(f"{source}: {name}", value, kinds)
        fields[name] = _plain_token(value) if isinstance(value, dict) and name != "extra_special_tokens" else value
    if "added_tokens_decoder" in fields:
        fields["added_tokens_decoder"] = {key: _plain_token(token) for key, token in values["added_tokens_decoder"].items()}
    for name in ("added_tokens_decoder", "extra_special_tokens", "additional_special_tokens"):
        if len(fields.get(name, ())) > ADDED:
            raise ValueError(f"{source}: {name} holds {len(fields[name]):,} tokens; at most {ADDED:,} are allowed")
    if isinstance(named := fields.get("extra_special_tokens"), dict):
        if odd := [key for key in named if not _TOKEN_NAME.fullmatch(key)]:
            raise ValueError(f"{source}: extra_special_tokens names {listed([shown(key) for key in odd])}; names end in _token")
        fields["extra_special_tokens"] = {key: _plain_token(token) for key, token in named.items()}
    if not _CLASS.fullmatch(fields.get("tokenizer_class", "x")):
        raise ValueError(f"{source}: tokenizer_class = {shown(fields['tokenizer_class'])} is no class of transformers")
    return fields


def _plain_token(token: Any) -> Any:
    return {key: token[key] for key in _TOKEN_KEYS if key in token} if isinstance(token, dict) else token


def _model_type(folder: Path) -> str:
    values = read_json(folder / "config.json")
    kind = values.get("model_type") if isinstance(values, dict) else None
    return kind if isinstance(kind, str) else ""


def _check_kind(name: str, value: Any, kinds: type | tuple[type, ...]) -> None:
    kinds = kinds if isinstance(kinds, tuple) else (kinds,)
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        raise ValueError(f"{name} = {shown(value)}; expected {' or '.join(kind.__name__ for kind in kinds)}")


def _base_fields() -> list[str]:
    from transformers import PreTrainedConfig

    return list(getattr(PreTrainedConfig, "__dataclass_fields__", {}))


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0][:300]}" if text else type(error).__name__
