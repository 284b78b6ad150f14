"""What several commands ask for: names that are known without torch, so that --help is quick."""

# those of `bitdance.heads.diffusion`
SAMPLERS = ("euler_maruyama", "euler", "heun", "dpmpp_2m", "dpmpp_2m_sde", "direct")
PRESETS = ("published", "balanced", "fast", "quick", "instant")
QUANTIZE, QUANTIZE_HEAD = ("int8", "int4"), ("int8", "fp8")  # those of `bitdance.networks.quantize`
DTYPE_NAMES = ("float32", "bfloat16", "float16", "auto")  # "auto": bfloat16 where it is quicker than float32
DTYPE_HELP = "default: bfloat16 on cuda, else float32; auto: bfloat16 where the processor has instructions for it"
