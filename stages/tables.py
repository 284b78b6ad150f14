"""Which keys the free-form tables of a config have, and which values: [generator.backbone], [generator.head],
[generator.defaults], [data.mix], [optimizer.scale] and [deepspeed.settings].
"""

from collections.abc import Collection, Mapping
from typing import Annotated, Any

from bitdance.heads.diffusion.flow import SCHEDULES
from bitdance.heads.diffusion.network import HeadConfig
from bitdance.heads.diffusion.settings import PRESETS
from bitdance.values import RANGES, Range
from lfq_tokenizer import TokenizerConfig, limits
from lfq_tokenizer.config import MOST_PATCH, MOST_ROUNDS, QUANTIZERS
from lfq_tokenizer.scale_vae import ScaleConfig
from stages.schema import DECLARED, Choice, Table, check_key, convert

_WIDTH, _LAYERS = Range(1, limits.WIDTH), Range(1, limits.LAYERS)
_TOKEN, _SMALL = Range(0, 10**9), Range(0, 1, whole=False)


def _fields_of_family(table: Mapping[str, Any]) -> Collection[str]:
    """Of transformers' config of `model_type`; every name where that is no family (the backbone says so)."""
    from transformers import CONFIG_MAPPING

    family = str(table.get("model_type", "qwen3"))
    if family not in CONFIG_MAPPING:
        return table.keys()
    config = CONFIG_MAPPING[family]()
    return {*config.to_dict(), *config.attribute_map, "rope_theta", "rope_scaling", "layer_types"}


# Fields of a Qwen3 config, which other families share; what more a family has is asked of transformers.
BACKBONE = Table(
    {
        "model_type": str,
        "vocab_size": Range(1, 10**8),
        **dict.fromkeys(("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim"), _WIDTH),
        "num_hidden_layers": _LAYERS,
        "max_window_layers": Range(0, limits.LAYERS),
        "max_position_embeddings": Range(1, 10**9),
        "rms_norm_eps": _SMALL,
        "initializer_range": Range(0, 100, whole=False),
        "attention_dropout": Range(0, 1, whole=False, open_high=True),
        "rope_theta": Range(0, 10**12, whole=False, open_low=True),
        **dict.fromkeys(("tie_word_embeddings", "attention_bias", "use_cache", "use_sliding_window"), bool),
        "sliding_window": Range(1, 10**9),
        "hidden_act": str,
        **dict.fromkeys(("pad_token_id", "bos_token_id"), _TOKEN),
    },
    others=_fields_of_family,
)

DECLARED[HeadConfig] = {
    **dict.fromkeys(("ch_target", "ch_cond", "ch_latent"), _WIDTH),
    **dict.fromkeys(("depth_latent", "depth_adanln"), _LAYERS),
    "parallel_num": Range(1, 65_536),
    "use_swiglu": bool,
    "time_shift": Range(0, 1000, whole=False, open_low=True),
    "time_schedule": Choice(tuple(SCHEDULES)),
    "P_mean": Range(-100, 100, whole=False),
    "P_std": Range(0, 100, whole=False, open_low=True),
    "diff_batch_mul": Range(1, 1024),
    "grad_checkpointing": bool,
}
HEAD = Table(DECLARED[HeadConfig])
DECLARED[TokenizerConfig] = {
    "ch": _WIDTH,
    "ch_mult": tuple[Annotated[int, Range(1, 1024)], ...],
    "num_res_blocks": _LAYERS,
    "z_channels": _WIDTH,
    "quantizer": Choice((*QUANTIZERS, "multi_scale")),
    "rounds": Range(1, MOST_ROUNDS),
    "patch": Range(1, MOST_PATCH),
}


class _Tokenizer(Table):
    """The shape of a picture tokenizer. `quantizer = "multi_scale"`: one of scales, of codes where `codes` says how many."""

    def check(self, name: str, value: Any) -> Any:
        if not isinstance(value, Mapping) or value.get("quantizer") != "multi_scale":
            return value if isinstance(value, ScaleConfig) else convert(TokenizerConfig, value, name)
        for key in value:
            check_key(key, list(ScaleConfig.__dataclass_fields__), f"{name}.")
        try:
            return ScaleConfig.from_published({"scales": {**value, "quantizer": "codes" if value.get("codes") else "bits"}})
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None


TOKENIZER = _Tokenizer()

DEFAULTS = Table(
    {
        **{name: RANGES[name] for name in ("height", "width", "num_inference_steps", "guidance_scale")},
        "preset": Choice(tuple(PRESETS)),
    }
)
MIX = Table({"": Range(0, 10**9, whole=False)}, keys=RANGES["height"])
SCALE = Table({"": Range(0, 10**6, whole=False)})  # which parts there are the model says: `learner.py`


def _deepspeed(model: str) -> Table:
    """A section that DeepSpeed checks itself: its keys are the fields of a model of pydantic."""

    def fields(table: Mapping[str, Any]) -> Collection[str]:
        from importlib import import_module

        module, _, name = model.rpartition(".")
        try:
            found = getattr(import_module(f"deepspeed.{module}"), name).model_fields
        except ImportError:  # it is not installed, and nothing will train
            return table.keys()
        return {*found, *(entry.alias for entry in found.values() if entry.alias)}

    return Table(others=fields)


_FREE = Table(others=None)
_COUNT = Range(1, 10**9)
# The top level of DeepSpeed's config, version 0.19, which DeepSpeed itself does not check.
DEEPSPEED = Table(
    {
        **dict.fromkeys(("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"), _COUNT),
        "steps_per_print": _COUNT,
        "gradient_clipping": Range(0, 10**9, whole=False),
        "gradient_predivide_factor": Range(0, 10**6, whole=False, open_low=True),
        "communication_data_type": str,
        "seq_parallel_communication_data_type": str,
        "gradient_allreduce_op": str,
        "log_level": str,
        **dict.fromkeys(
            (
                "prescale_gradients",
                "sparse_gradients",
                "disable_allgather",
                "fp32_allreduce",
                "dump_state",
                "disable_python_gc",
                "wall_clock_breakdown",
                "memory_breakdown",
                "zero_allow_untested_optimizer",
                "zero_force_ds_cpu_optimizer",
                "graph_harvesting",
                "use_data_before_expert_parallelism",
                "dataloader_drop_last",
                "use_node_local_storage",
            ),
            bool,
        ),
        "zero_optimization": _deepspeed("runtime.zero.config.DeepSpeedZeroConfig"),
        "bf16": _deepspeed("runtime.precision_config.DeepSpeedBF16Config"),
        "fp16": _deepspeed("runtime.precision_config.DeepSpeedFP16Config"),
        "flops_profiler": _deepspeed("profiling.config.DeepSpeedFlopsProfilerConfig"),
        "comms_logger": _deepspeed("comm.config.CommsConfig"),
        "torch_autocast": Table({"enabled": bool, "dtype": str, "lower_precision_safe_modules": tuple[str, ...]}),
        "data_types": Table({"grad_accum_dtype": str}),
        "activation_checkpointing": Table(
            {
                **dict.fromkeys(
                    (
                        "partition_activations",
                        "contiguous_memory_optimization",
                        "cpu_checkpointing",
                        "synchronize_checkpoint_boundary",
                        "profile",
                    ),
                    bool,
                ),
                "number_checkpoints": _COUNT,
            }
        ),
        **dict.fromkeys(
            ("aio", "compile", "compression_training", "data_efficiency", "tensorboard", "wandb", "csv_monitor", "comet"), _FREE
        ),
    }
)
