"""Shape of a tokenizer, as stored in the published `ae_config.json`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lfq_tokenizer import limits
from lfq_tokenizer.text import listed

NORM_GROUPS = 32
QUANTIZERS = ("lfq", "hbq", "none")
MOST_ROUNDS = 16
MOST_PATCH = 16
_OWN = ("quantizer", "rounds", "patch")  # OURS: what no published tokenizer says
_DDCONFIG_KEYS = {"ch", "out_ch", "in_channels", "num_res_blocks", "z_channels", "ch_mult", "double_z", "resolution"}


def _short(value: Any) -> str:
    try:
        return f"{value!r:.60}"
    except (ValueError, RecursionError):  # a number of thousands of digits, or nested too deeply
        return type(value).__name__


@dataclass(frozen=True)
class TokenizerConfig:
    """`ch` base width, `ch_mult` width factor per level, `z_channels` channels of a latent, `gan_decoder` noise beside them.

    `quantizer` "lfq": a latent is one bit, its sign. "hbq": a latent, squashed by tanh, is `rounds` bits (`hierarchical.py`).
    "none": latents, squashed by tanh, stay numbers; for comparison with bits. A token is a square of `patch` × `patch` latents:
    with 2 a picture has a quarter of the tokens, each of four times the bits, and a model of the same width costs a quarter.
    """

    ch: int = 256
    ch_mult: tuple[int, ...] = (1, 1, 2, 2, 4)
    num_res_blocks: int = 4
    z_channels: int = 32
    gan_decoder: bool = False
    quantizer: str = "lfq"
    rounds: int = 1
    patch: int = 1

    def __post_init__(self) -> None:
        if not isinstance(self.ch_mult, (list, tuple)) or not 1 <= len(self.ch_mult) <= limits.LEVELS:
            said = f"{len(self.ch_mult)} of them" if isinstance(self.ch_mult, (list, tuple)) else type(self.ch_mult).__name__
            example = "give one width factor per level, for example [1, 1, 2, 2, 4]"
            raise ValueError(f"ch_mult: {said}; {example}, at most {limits.LEVELS}")
        object.__setattr__(self, "ch_mult", tuple(self.ch_mult))
        most = {"ch": limits.WIDTH, "num_res_blocks": limits.LAYERS, "z_channels": limits.WIDTH}
        most |= {"rounds": MOST_ROUNDS, "patch": MOST_PATCH}
        for name, value in (*((name, getattr(self, name)) for name in most), *(("ch_mult", factor) for factor in self.ch_mult)):
            high = most.get(name, limits.WIDTH)
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= high:
                raise ValueError(f"{name} = {_short(value)}; a whole number from 1 to {high} is allowed")
        if not isinstance(self.gan_decoder, bool):
            raise ValueError(f"gan_decoder = {_short(self.gan_decoder)}; true or false is allowed")
        if not isinstance(self.quantizer, str) or self.quantizer not in QUANTIZERS:
            raise ValueError(f"quantizer = {_short(self.quantizer)}; allowed are {', '.join(QUANTIZERS)}")
        if self.quantizer != "hbq" and self.rounds != 1:
            raise ValueError(f'rounds = {self.rounds} with quantizer = "{self.quantizer}", which has one; "hbq" has more')
        for factor in self.ch_mult:
            if (self.ch * factor) % NORM_GROUPS:
                raise ValueError(
                    f"ch {self.ch} × ch_mult {factor} = {self.ch * factor} channels; group norm needs a positive "
                    f"multiple of {NORM_GROUPS}"
                )

    @property
    def latents(self) -> int:
        """Channels of the encoder's grid, of which a token is a patch."""
        return self.z_channels

    @property
    def bits(self) -> int:
        """Bits per token; 0 where a token is numbers."""
        return 0 if self.quantizer == "none" else self.width

    @property
    def width(self) -> int:
        """Bits or numbers per token: the channels of what `encode` returns."""
        return self.z_channels * self.rounds * self.patch**2

    @property
    def token(self) -> str:
        """What a token is; a model must have been trained on the same."""
        return f"{self.width} bits" if self.bits else f"{self.width} numbers"

    @property
    def layers(self) -> int:
        """Residual blocks of the encoder, each of which has tensors of its own."""
        return len(self.ch_mult) * self.num_res_blocks

    @property
    def downsampling(self) -> int:
        """Pixels per token along a side."""
        return self.stride * self.patch

    @property
    def stride(self) -> int:
        """Pixels per latent along a side."""
        return 2 ** (len(self.ch_mult) - 1)

    @classmethod
    def from_published(cls, data: Mapping[str, Any]) -> "TokenizerConfig":
        """From the JSON object of `ae_config.json`. `double_z`, `resolution` and `checkpoint` have no effect there."""
        if not isinstance(data, Mapping):
            raise ValueError(f"the tokenizer config is a {type(data).__name__}; expected an object")
        unknown = set(data) - {"ddconfig", "gan_decoder", "checkpoint", *_OWN}
        if unknown or not isinstance(data.get("ddconfig"), Mapping):
            raise ValueError(
                f"tokenizer config has keys {listed(sorted(map(_short, data)), ', ')}; expected 'ddconfig' and 'gan_decoder'. "
                "Is this an ae_config.json?"
            )
        dd = data["ddconfig"]
        if unknown := set(dd) - _DDCONFIG_KEYS:
            names = listed(sorted(map(_short, unknown)), ", ")
            raise ValueError(f"unknown ddconfig keys {names}; known are {sorted(_DDCONFIG_KEYS)}")
        if missing := {"ch", "num_res_blocks", "z_channels", "ch_mult"} - set(dd):
            raise ValueError(f"ddconfig lacks {sorted(missing)}")
        for key in ("in_channels", "out_ch"):
            if dd.get(key, 3) != 3:
                raise ValueError(f"ddconfig {key} = {_short(dd[key])}; only RGB tokenizers (3) exist")
        return cls(
            ch=dd["ch"],
            ch_mult=dd["ch_mult"],
            num_res_blocks=dd["num_res_blocks"],
            z_channels=dd["z_channels"],
            gan_decoder=data.get("gan_decoder", False),
            **{name: data[name] for name in _OWN if name in data},
        )

    @classmethod
    def from_shapes(cls, shapes: Mapping[str, Sequence[int]]) -> "TokenizerConfig":
        """From the shapes of `encoder.*` and `decoder.*` tensors, for files that carry no config.

        Reads only the tensors that decide a field; whether all others fit is for `weights.check_shapes` to say. ValueError
        names a deciding tensor that is missing or of an impossible shape.
        """

        def shape(name: str) -> Sequence[int]:
            if name not in shapes:
                raise ValueError(f"no tensor {name}; these are not the tensors of a tokenizer of this family")
            if len(shapes[name]) != 4:
                raise ValueError(f"{name} has shape {list(shapes[name])}; expected four dimensions")
            return shapes[name]

        def count(pattern: str) -> int:
            number = 0
            while pattern.format(number) in shapes:
                number += 1
            return number

        ch, bits = shape("encoder.conv_in.weight")[0], shape("encoder.conv_out.weight")[0]
        levels = max(1, count("encoder.down.{}.block.0.conv1.weight"))
        widths = [shape(f"encoder.down.{i}.block.0.conv1.weight")[0] for i in range(levels)]
        if ch < 1 or any(width % ch for width in widths):
            raise ValueError(f"encoder levels of {widths} channels are not whole multiples of its first, {ch}")
        read = shape("decoder.conv_in.weight")[1]
        if read not in (bits, 2 * bits):
            raise ValueError(f"decoder.conv_in.weight reads {read} channels; expected {bits}, or {2 * bits} with noise")
        return cls(
            ch=ch,
            ch_mult=tuple(width // ch for width in widths),
            num_res_blocks=count("encoder.down.0.block.{}.conv1.weight"),
            z_channels=bits,
            gan_decoder=read == 2 * bits,
        )

    def to_published(self) -> dict[str, Any]:
        """The JSON object of `ae_config.json`."""
        own = {} if self.quantizer == "lfq" else {"quantizer": self.quantizer, "rounds": self.rounds}
        if self.patch != 1:
            own["patch"] = self.patch
        ddconfig = {name: getattr(self, name) for name in ("ch", "ch_mult", "num_res_blocks", "z_channels")}
        return {
            "ddconfig": {**ddconfig, "ch_mult": list(self.ch_mult), "in_channels": 3, "out_ch": 3, "double_z": False},
            "gan_decoder": self.gan_decoder,
            **own,
        }
