"""What the sections of such recipes have in common."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

from bitdance.values import Range
from stages.schema import Checked, StepsOrNone, Table


@dataclass(frozen=True)
class PictureTraining(Checked):
    """On top of a frozen tokenizer, on pictures of labelled classes or, where a text encoder is named, of captions.

    A picture is brought to `size` × `size` pixels by a crop. With `crop_share` below 1 it is random: a square of at least that
    share of the shorter side. Random crops become rarer from epoch `crop_decay[0]` on, and from `crop_decay[1]` on there is
    the middle square alone. Shards of bits are taken as they are.
    """

    tokenizer: str = ""  # a run of recipe 'tokenizer', a checkpoint of one, or a folder with ae_config.json and ae.safetensors
    init: str = ""  # a model to go on from: a run, a checkpoint or a model folder; its shape must be what the config says
    classes: str = ""  # a classes.json that numbers the labels; empty: the labels of the samples, sorted
    class_count: StepsOrNone = 0  # how many classes there must be; 0: as many as the data have
    size: Annotated[int, Range(1, 65_536)] = 256
    crop_share: Annotated[float, Range(0, 1, whole=False, open_low=True)] = 1.0
    crop_decay: tuple[StepsOrNone, ...] = ()
    model: Annotated[Mapping[str, Any], Table()] = field(default_factory=dict)
    checkpoint_activations: bool = False  # recompute a layer's inside in the backward pass instead of keeping it
    defaults: Annotated[Mapping[str, Any], Table()] = field(default_factory=dict)  # of sampling; written to bitdance.json
    sample_classes: tuple[str, ...] = ()  # of the grids; empty: the first eight

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.crop_decay and not (len(self.crop_decay) == 2 and self.crop_decay[0] < self.crop_decay[1]):
            raise ValueError(
                f"{self.SECTION}.crop_decay = {list(self.crop_decay)}; two epochs are allowed, the first before the second"
            )

    def check_tokenizer(self) -> None:
        """ValueError where none is named."""
        if not self.tokenizer:
            raise ValueError(
                f"{self.SECTION}.tokenizer is empty; name a run of recipe 'tokenizer' or a folder with ae_config.json"
            )


@dataclass(frozen=True)
class PromptTraining(PictureTraining):
    """With `text_encoder`, a folder as transformers keeps it (umT5, T5, or a language model such as our own), the pictures are
    those of captions, of up to `max_text_tokens` tokens; otherwise of classes. See `PictureTraining`."""

    text_encoder: str = ""
    text_width: Annotated[int, Range(0, 1 << 20)] = 0  # features of a text token, for a plan where the text encoder is not here
    max_text_tokens: Annotated[int, Range(1, 10**6)] = 256
    prompt_prefix: str = ""  # in front of every prompt, as the published joint text model of GRN has "<T2I>"
    sample_prompts: tuple[str, ...] = ()
