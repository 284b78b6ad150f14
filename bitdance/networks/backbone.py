"""The backbone: a decoder-only language model of transformers (Qwen3 first) that takes embeddings and a mask of ours.

B batch, L new positions, S positions the keys cover (cache included), D hidden size, K rows, V vocabulary.
"""

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from transformers import AutoModel, AutoModelForCausalLM, DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.utils import logging as transformers_logging

from bitdance.foreign import build_config, view
from bitdance.networks.attention import ATTENTION, padding_runs
from bitdance.networks.cache import StaticCache
from lfq_tokenizer.files import umask
from lfq_tokenizer.json_file import read_config, read_json, write_json
from lfq_tokenizer.text import listed
from lfq_tokenizer.weights import check_depth, read_shapes, read_weight_map

_INDEX = "model.safetensors.index.json"


class Backbone(nn.Module):
    """Holds `.lm`, an `AutoModelForCausalLM` of transformers, and calls it with our masks.

    Tested families: Qwen3, Qwen2, Llama, Mistral, SmolLM3, OLMo 2, Phi-3, Gemma, Granite, GLM-4. Any other decoder with rotary
    positions and full attention is taken if it shows what `forward` needs; mixtures of experts train without their balancing
    loss. Sliding windows, linear attention, scaled or capped logits and learned positions are refused.
    """

    def __init__(self, lm: PreTrainedModel) -> None:
        """Wrap a loaded language model. ValueError if its family cannot carry the block-causal mask."""
        super().__init__()
        _check_family(lm.config)
        with _quiet():
            lm.set_attn_implementation(ATTENTION)
        if lm.config._attn_implementation != ATTENTION:
            raise _refused(lm.config, "it computes attention by itself, so no mask of ours would reach it")
        if not hasattr(lm.base_model, "rotary_emb"):
            raise _refused(lm.config, "its positions are not rotary and end at the length it was trained with")
        # transformers 5.24 calls `cache` what earlier ones call `past_key_values`
        takes = inspect.signature(lm.base_model.forward).parameters
        self._cache_name = "cache" if "cache" in takes else "past_key_values"
        lm.config._name_or_path = ""  # a saved config must not name a folder of this machine
        self.lm = lm

    @classmethod
    def from_config(
        cls,
        config: Mapping[str, Any] | PreTrainedConfig,
        dtype: torch.dtype | None = None,
        generator: torch.Generator | None = None,
    ) -> "Backbone":
        """A new model with random weights. `config`: a transformers config, or its dictionary with `model_type`.

        With `generator`, the weights follow from it alone; without, from torch's global state, as transformers does.
        """
        if not isinstance(config, PreTrainedConfig):
            config = build_config(config)
        _check_family(config)
        if generator is None:
            return cls(_new_model(config, dtype))
        with torch.random.fork_rng():
            torch.manual_seed(int(torch.randint(2**62, (), generator=generator, device=generator.device)))
            return cls(_new_model(config, dtype))

    @classmethod
    def from_pretrained(cls, folder: Path | str, dtype: torch.dtype | None = None, output_head: bool = True) -> "Backbone":
        """Read `config.json` and `model*.safetensors` of a local folder; nothing is downloaded, and no other format
        is read.

        `dtype=None` keeps the dtype that the config names. `output_head=False` leaves the text output (`lm_head`) on disk,
        unless the embedding serves as such: `logits` is then an error. Missing files raise FileNotFoundError; broken files and
        weights that do not fit the config raise ValueError, which lists the first ten offenders.
        """
        folder = Path(folder)
        config = read_config(folder / "config.json", build_config)
        _check_family(config)
        _check_room(config, _check_files(folder), folder)
        whole = output_head or getattr(config, "tie_word_embeddings", False)
        try:
            with _quiet(), view(folder) as safe:
                lm, report = (AutoModelForCausalLM if whole else AutoModel).from_pretrained(
                    str(safe),
                    config=config,
                    dtype=_dtype_of(folder) if dtype is None else dtype,
                    local_files_only=True,
                    use_safetensors=True,
                    trust_remote_code=False,
                    output_loading_info=True,
                    ignore_mismatched_sizes=True,  # reported below, in our words
                )
        except Exception as error:  # the library raises many kinds
            raise ValueError(f"the backbone in {folder} could not be loaded: {error}") from error
        if not whole:
            prefix = lm.base_model_prefix + "."
            report["unexpected_keys"] = {name for name in report["unexpected_keys"] if name.startswith(prefix)}
        _check_report(report, folder)
        return cls(lm)

    @property
    def has_output_head(self) -> bool:
        """Whether `logits` can be computed."""
        return self.lm.get_output_embeddings() is not None

    def save_pretrained(self, folder: Path | str) -> None:
        """Write `config.json` and `model*.safetensors`, readable by this and by older transformers."""
        self._need_output_head()
        with _quiet():
            self.lm.save_pretrained(str(folder))
        for weights in Path(folder).glob("*.safetensors"):
            weights.chmod(0o666 & ~umask())  # the library writes them for their owner alone
        path = Path(folder) / "config.json"
        config = read_json(path)
        rope = dict(config.get("rope_parameters") or {})
        if "rope_theta" in rope:  # transformers 4 looks for it at the top level, and in silence uses 10000 without it
            config["rope_theta"] = rope.pop("rope_theta")
            config["rope_scaling"] = None if rope.get("rope_type", "default") == "default" else rope
        write_json(config, path)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Backbone":
        """`.to(dtype)` of any module above passes here. Rotary frequencies stay float32: in bfloat16 the angle at
        position 1000 is off by whole radians, and transformers protects them only while loading."""
        with exact_frequencies(self.lm):
            super()._apply(fn, recurse)
        return self

    @property
    def hidden_size(self) -> int:
        """D."""
        return int(self.lm.config.hidden_size)

    @property
    def vocabulary_size(self) -> int:
        """V, rows of the embedding."""
        return int(self.lm.get_input_embeddings().weight.shape[0])

    @property
    def device(self) -> torch.device:
        """The device of the layers, where the work is done; the embedding may lie elsewhere."""
        return next(self.lm.base_model.layers.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the embedding, which is that of inputs and outputs."""
        return self.lm.get_input_embeddings().weight.dtype

    def embed(self, ids: Tensor) -> Tensor:
        """Token ids (…) → (…,D)."""
        return self.lm.get_input_embeddings()(ids)

    def forward(
        self,
        inputs_embeds_BLD: Tensor,
        position_BL: Tensor | None = None,
        mask: Tensor | BlockMask | None = None,
        cache: Any = None,
        causal: bool = True,
        padding: Sequence[int] | None = None,
    ) -> Tensor:
        """Hidden states (B,L,D) after the final norm; `cache`, from `new_cache`, is extended by the L new positions.

        `mask`: bool (B,1,L,S), True where the query may see the key, or a BlockMask. Without a mask, `causal=True` is
        the usual causal attention and `causal=False` lets every new position see the whole cache and all new
        positions, by the kernel without a mask. With `padding`, one count per row, the new positions do so but for the first
        positions of the cache, so many per row. `position_BL` defaults to going on from the end of the cache.
        """
        length = 0 if cache is None else cache.get_seq_length()
        L = inputs_embeds_BLD.shape[1]
        if mask is None and causal and length and L > 1:
            # SDPA aligns its own causal mask with the first key, which is right only for an empty cache.
            mask = torch.ones(L, length + L, dtype=torch.bool, device=inputs_embeds_BLD.device).tril(length)[None, None]
        return self._states(
            inputs_embeds_BLD,
            attention_mask=mask,
            position_ids=position_BL,
            use_cache=cache is not None,
            is_causal=causal,
            **({} if padding is None else {"runs": padding_runs(padding)}),
            **{self._cache_name: cache},
        )

    def _states(self, inputs_embeds_BLD: Tensor, **arguments: Any) -> Tensor:
        """The call itself: inputs → states after the final norm, in the terms of transformers."""
        states_BLD: Tensor = self.lm.base_model(inputs_embeds=inputs_embeds_BLD, **arguments).last_hidden_state
        return states_BLD

    def logits(self, hidden_KD: Tensor) -> Tensor:
        """Hidden states (…,D) → scores (…,V) of the next text token."""
        self._need_output_head()
        return self.lm.get_output_embeddings()(hidden_KD)

    def _need_output_head(self) -> None:
        if not self.has_output_head:
            raise ValueError("the backbone was loaded without its text output, for pictures only; load it with output_head=True")

    def checkpoint_activations(self) -> None:
        """Keep, in training, only each layer's input and compute the rest again in the backward pass."""
        enable = getattr(self.lm, "activation_checkpointing_enable", self.lm.gradient_checkpointing_enable)  # its older name
        enable({"use_reentrant": False})

    def new_cache(self, capacity: int | None = None) -> Cache:
        """An empty key/value cache for `forward`, of room for `capacity` positions or one that grows."""
        if capacity is not None:
            return StaticCache(self.lm.config.num_hidden_layers, capacity)
        return DynamicCache(config=self.lm.config)

    def grow_vocabulary(self, size: int, generator: torch.Generator | None = None) -> None:
        """Grow embedding and output head to `size` rows. New rows are the mean of the old ones plus noise of a tenth
        of their spread, so that new tokens start plausible but distinct. Noise comes from `generator` (on the
        weights' device), or from a generator of seed 0. Tied heads stay tied. ValueError if `size` is smaller than
        the vocabulary.
        """
        old = self.vocabulary_size
        if size < old:
            raise ValueError(f"the vocabulary has {old} tokens and can only grow, not shrink to {size}")
        if size == old:
            return
        embedding, head = self.lm.get_input_embeddings(), self.lm.get_output_embeddings()
        device = embedding.weight.device
        generator = torch.Generator(device).manual_seed(0) if generator is None else generator
        tied = head is not None and head.weight is embedding.weight
        embedding.weight = _grown(embedding.weight, size, generator)
        embedding.num_embeddings = size
        if tied:
            head.weight = embedding.weight
        elif head is not None:
            head.weight = _grown(head.weight, size, generator)
            if head.bias is not None:
                head.bias = nn.Parameter(torch.cat([head.bias.detach(), head.bias.detach().new_zeros(size - old)]))
        if head is not None:
            head.out_features = size
        self.lm.config.vocab_size = size
        for module in (self.lm, self.lm.base_model):
            if hasattr(module, "vocab_size"):
                module.vocab_size = size


@contextmanager
def exact_frequencies(lm: nn.Module) -> Iterator[None]:
    """Whatever converts `lm` in this block, its rotary frequencies keep their dtype; they move with it."""
    exact = {name: buffer for name, buffer in lm.named_buffers() if name.endswith("inv_freq")}
    yield
    for name, before in exact.items():
        path, _, leaf = name.rpartition(".")
        owner = lm.get_submodule(path)
        after = getattr(owner, leaf)
        if after.dtype != before.dtype:
            setattr(owner, leaf, before.to(after.device))


@contextmanager
def _quiet() -> Iterator[None]:
    """Run without transformers' progress bar and load report: ours are errors that name the file."""
    bar, verbosity = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bar:
            transformers_logging.enable_progress_bar()


def _grown(weight_VD: nn.Parameter, size: int, generator: torch.Generator) -> nn.Parameter:
    old_VD = weight_VD.detach().float()
    noise = torch.randn(size - old_VD.shape[0], old_VD.shape[1], generator=generator, device=old_VD.device)
    new = old_VD.mean(0) + 0.1 * old_VD.std(0) * noise
    return nn.Parameter(torch.cat([weight_VD.detach(), new.to(weight_VD.dtype)]), requires_grad=weight_VD.requires_grad)


def _new_model(config: PreTrainedConfig, dtype: torch.dtype | None) -> PreTrainedModel:
    try:
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32 if dtype is None else dtype, trust_remote_code=False)
    except Exception as error:  # the library raises many kinds for values that do not fit together
        kind = config.model_type
        raise ValueError(f"backbone config of family {kind!r} was refused: {type(error).__name__}: {error}") from error


def _dtype_of(folder: Path) -> torch.dtype | str:
    """The dtype that a config names, float32 where it names none; "auto", that of the weights, for anything else."""
    said = read_json(folder / "config.json")
    name = said.get("dtype", said.get("torch_dtype"))
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    return known.get(name, "auto") if isinstance(name, str) else "auto"


def _check_family(config: PreTrainedConfig) -> None:
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"}:
        raise ValueError(
            f"backbone layers of kind {sorted(kinds - {'full_attention'})} cannot carry the block-causal mask; "
            "use a model whose layers all have full attention (for Qwen3: use_sliding_window false)"
        )
    if window := getattr(config, "sliding_window", None):
        reason = f"attention ends after {window} tokens; set sliding_window to null in its config.json if no sequence is longer"
        raise _refused(config, reason)
    for name in ("logit_scale", "logits_scaling", "final_logit_softcapping"):
        if getattr(config, name, None) not in (None, 1):
            raise _refused(config, f"it changes its text scores after the output head ({name} = {getattr(config, name)})")
    if config.is_encoder_decoder:
        raise _refused(config, "it is an encoder with a decoder")


def _refused(config: PreTrainedConfig, reason: str) -> ValueError:
    return ValueError(f"a backbone of family {config.model_type!r} cannot serve: {reason}")


def _check_room(config: PreTrainedConfig, found: Mapping[str, tuple[int, ...]], folder: Path) -> None:
    """ValueError for a config of a far larger model than the files hold: the library would make room for what it misses."""
    check_depth(getattr(config, "num_hidden_layers", None) or 1, found, folder / "model*.safetensors")
    with torch.device("meta"):
        lm = _new_model(config, None)
    wanted = sum(tensor.numel() for tensor in (*lm.parameters(), *lm.buffers()))  # some families keep tables of positions
    if wanted > 2 * (held := sum(map(math.prod, found.values()))) + 2**20:
        raise ValueError(
            f"{folder / 'config.json'} describes {wanted:,} numbers, and model*.safetensors hold {held:,}. "
            "Weights and config must come from the same model."
        )


def _check_files(folder: Path) -> dict[str, tuple[int, ...]]:
    """Name → shape of all weights. Every file is there and whole, and the index names only files of this folder."""
    index = folder / _INDEX
    if (folder / "model.safetensors").is_file() or not index.is_file():
        return read_shapes(folder / "model.safetensors")
    weight_map = read_weight_map(index)
    found = {shard: read_shapes(folder / shard) for shard in sorted(set(weight_map.values()))}
    lost = [f"{name} in {shard}" for name, shard in weight_map.items() if name not in found[shard]]
    if lost:
        raise ValueError(f"{index} names weights that its files do not hold: {listed(lost)}")
    return {name: shape for shapes in found.values() for name, shape in shapes.items()}


def _check_report(report: Mapping[str, Any], folder: Path) -> None:
    problems = [f"missing {name}" for name in sorted(report["missing_keys"])]
    problems += [f"unexpected {name}" for name in sorted(report["unexpected_keys"])]
    for mismatch in sorted(report["mismatched_keys"], key=str):
        name, found, expected = mismatch if isinstance(mismatch, tuple) else (mismatch, "?", "?")
        problems.append(f"{name} has shape {list(found)}, expected {list(expected)}")
    problems += list(report.get("error_msgs") or [])
    if problems:
        raise ValueError(
            f"the weights in {folder} do not fit its config.json: {listed(problems)}. "
            "Weights and config must come from the same model."
        )
