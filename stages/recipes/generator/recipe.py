"""Recipe 'generator': what the engine asks of it (see `stages/recipe.py`), put together from this folder's parts.

Shards hold pictures or, cheaper, bits that `bitdance tokenizer encode` wrote.
"""

import dataclasses
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

from bitdance.folder.checkpoint import save_model
from bitdance.folder.sizes import rule_of_model
from bitdance.generate import generate_bits
from bitdance.heads.diffusion.settings import choose
from bitdance.model import BitDanceModel
from bitdance.networks.kernels import use_fused_kernels
from bitdance.picture import grid, to_pil
from bitdance.sequence.prompt import conditional_ids, unconditional_ids
from bitdance.sequence.vocabulary import with_words
from lfq_tokenizer import LFQTokenizer
from lfq_tokenizer.text import decoded, text_lines
from stages.config import DataConfig, GeneratorTraining, TrainingConfig
from stages.data.buckets import Buckets
from stages.data.mixture import Mixture, Source
from stages.data.shards import ShardDataset, ShardIndex
from stages.engine import processes
from stages.engine.checkpoint import ADAPTER
from stages.plan.flops import token_flops
from stages.recipe import Discriminator
from stages.recipes.chain import check_bits, next_card
from stages.recipes.generator.documents import Documents
from stages.recipes.generator.feed import GeneratorFeed, Layout
from stages.recipes.generator.lora import base_of, save_adapter
from stages.recipes.generator.objective import GeneratorObjective
from stages.recipes.generator.validation import heldout_losses
from stages.recipes.tokenizer.coding import decode_pictures

LISTED_SAMPLES = 20_000  # read at most, for the list of prompts in bitdance.json
LISTED_SIZES = 64  # a model trained on more sizes makes every size
PROBED = 64  # samples that stand for all, where a mean is asked for
PATHS = ("tokenizer", "pretrained", "init", "text_extra")  # of this machine; a model that is given away does not name them


class GeneratorRecipe:
    """See `recipe.Recipe`. ValueError where the samples do not fit the model.

    `objective` is what trains `model`. Distillation, a generator with a teacher, gives its own and says what else differs: how
    examples are laid out, the models that compute `beside` the trained one, and what it lays over the `defaults` and the `card`.
    """

    discriminator: Discriminator | None = None

    def __init__(
        self,
        config: TrainingConfig,
        sources: Sequence[Source],
        model: BitDanceModel,
        objective: GeneratorObjective,
        lay_out: Layout = Documents.batch,
        beside: Sequence[BitDanceModel] = (),
        defaults: Mapping[str, Any] | None = None,
        card: Mapping[str, Any] | None = None,
    ) -> None:
        self.config, self.training, self.sources = config, config.generator, sources
        self._changed_defaults, self._card = defaults or {}, card or {}
        assert model.tokenizer is not None
        self.tokenizer: LFQTokenizer = model.tokenizer.eval().requires_grad_(False)
        self._before = model.extras
        self._base = base_of(self.training) if self.training.lora else {}
        self.base = self._base.get("fingerprint", "")
        for source in sources:
            check_bits([shard.address for shard in source.data.index.shards], self.tokenizer)
        for part in self.training.freeze:
            getattr(model, part).requires_grad_(False)
        if self.training.checkpoint_activations:
            model.backbone.checkpoint_activations()
            model.head.net.grad_checkpointing = True
        if self.training.kernels == "auto":
            use_fused_kernels(model.backbone.lm, "cuda" if torch.cuda.is_available() else "cpu")
        self.module: nn.Module = objective

        mix = {int(resolution): share for resolution, share in config.data.mix.items()}
        rule = dataclasses.replace(rule_of_model(model), trained=())
        self.buckets = Buckets(rule, tuple(mix))
        self.mixture = Mixture(sources, config.run.seed, mix, self.buckets, config.data.enlarge)
        self.heldout = self._heldout(mix)
        self.documents = Documents(
            model.text_tokenizer,
            model.special,
            self.tokenizer,
            model.head.config,
            self.buckets,
            self.training,
            config.data.row_tokens,
            # compiled kernels want few lengths
            multiple_of=128 if torch.cuda.is_available() else 1,
        )
        self.feed = GeneratorFeed(self.mixture, self.documents, config.run.seed, lay_out)
        self.flops = self._token_flops(model) + sum(self._token_flops(other, encodes=False) for other in beside)

    def defaults(self) -> dict[str, Any]:
        """The settings of generation that are saved with the model: the size of the largest pictures and what the config says;
        with an adapter, what its base says."""
        overrides = {**self.training.defaults, **self._changed_defaults}
        if self.training.lora:
            return {**self._before.get("defaults", {}), **overrides}
        height, width = max(self._sizes, key=lambda size: (size[0] * size[1], size))
        steps = {} if "preset" in overrides else {"num_inference_steps": 20}
        return {"height": height, "width": width, **steps, "guidance_scale": 3.0, **overrides}

    def settings(self) -> dict[str, Any]:
        """How the model was trained, for its card: no path of this machine."""
        training = dataclasses.asdict(self.training)
        known = {name: value for name, value in training.items() if name not in PATHS and value is not None}
        return {"training": known, **self._card}

    def _heldout(self, mix: dict[int, float]) -> Mixture | None:
        """Every resolution of the mix gets an equal part, as far as the held-out shards have it."""
        if not self.config.data.heldout:
            return None
        sources = [Source(ShardDataset(ShardIndex.open(self.config.data.heldout)))]
        equal = {resolution: 1.0 for resolution, share in mix.items() if share}
        return Mixture(sources, 0, equal, self.buckets, self.config.data.enlarge, optional=True)

    def _token_flops(self, model: BitDanceModel, encodes: bool = True) -> float:
        """From the sizes and captions of the first samples, as far as they can be read. `encodes`: with what pictures cost that
        come as pixels."""
        references, captions, shapes = [], [], []
        for reference in (self.mixture.at(index) for index in range(min(PROBED, len(self.mixture)))):
            data = self.sources[reference.source].data
            known, shape = data.readable(data.caption, reference.number), data.readable(data.shape, reference.number)
            if known and shape:
                references.append(reference)
                captions.append(known[0][0])
                shapes.append(shape)
        if not references:
            first = min(PROBED, len(self.mixture))
            raise ValueError(f"none of the first {first} samples can be read; see `bitdance data inspect`")
        sizes = Counter(self.mixture.size(reference, self.buckets) for reference in references)
        s = self.tokenizer.downsampling
        grids = {(height // s, width // s): count / len(references) for (height, width), count in sizes.items()}
        words = [len(conditional_ids(model.text_tokenizer, caption, self.training.max_text_tokens)) for caption in captions]
        dropped = self.training.dropout * len(unconditional_ids(model.text_tokenizer))
        text = (1 - self.training.dropout) * sum(words) / len(words) + dropped
        return token_flops(model, grids, text, pixels=encodes and not all(shape.bits for shape in shapes))

    def parts(self) -> dict[str, list[nn.Parameter]]:
        """Backbone, projector and head, as far as they train."""
        model = _objective(self.module).model
        named: dict[str, nn.Module] = {"backbone": model.backbone, "projector": model.projector, "head": model.head}
        return {name: [p for p in part.parameters() if p.requires_grad] for name, part in named.items()}

    @torch.no_grad()
    def validate(self, module: nn.Module) -> dict[str, float]:
        """The losses on up to 256 held-out samples with their first caption, no bit flipped, under fixed noise."""
        return {} if self.heldout is None else heldout_losses(_objective(module), self.documents, self.heldout)

    @torch.no_grad()
    def sample(self, module: nn.Module) -> Image.Image:
        """The run's fixed prompts with fixed seeds; its own generators, so that training is not disturbed."""
        data = self.sources[0].data
        known = filter(None, (data.readable(data.caption, i) for i in range(len(data))))
        prompts = list(self.training.sample_prompts) or [captions[0] for captions, _ in islice(known, 8)]
        defaults = self.defaults()
        model = _objective(module).whole()
        s = self.tokenizer.downsampling
        bits_BChw = generate_bits(
            model,
            prompts,
            defaults["height"] // s,
            defaults["width"] // s,
            choose(defaults),
            [torch.Generator().manual_seed(i) for i in range(len(prompts))],
        )
        # one by one: at 1024² pixels a picture takes 4 GiB
        return grid([to_pil(decode_pictures(self.tokenizer, bits_Chw[None]))[0] for bits_Chw in bits_BChw])

    @cached_property
    def _sizes(self) -> list[tuple[int, int]]:
        """Sizes in pixels that the first samples of the run come in, as far as they can be read."""
        references = [self.mixture.at(index) for index in range(min(1000, len(self.mixture)))]
        sources = self.sources
        readable = [r for r in references if sources[r.source].data.readable(sources[r.source].data.shape, r.number)]
        return sorted({self.mixture.size(reference, self.buckets) for reference in readable})

    @cached_property
    def _prompts_known(self) -> list[str]:
        """First caption of each distinct picture, where the shards say what a picture shows; else of the first samples. Pictures
        of scenes list what they show as `concepts`, and each thing that stands alone in one counts once."""
        known: dict[str, str] = {}
        for data in (source.data for source in self.sources):
            found = (data.readable(data.caption, i) for i in range(min(len(data), LISTED_SAMPLES)))
            for captions, attributes in filter(None, found):
                things = attributes.get("concepts")  # attributes are of any type, in shards of strangers
                if isinstance(things, list) and len(things) != 1:
                    continue
                shows = things or [attributes.get("concept", captions[0]), attributes.get("style")]
                known.setdefault(json.dumps(shows), captions[0])
        return list(known.values())

    @cached_property
    def _words_known(self) -> dict[str, Any]:
        """`{"words": …}` of the model that the run started from, and of the captions since; {} where that lists none."""
        before = {name: value for name, value in self._before.items() if name == "words"}
        return with_words(before, texts(self.sources, self.training)) if before else {}

    def save_model(self, module: nn.Module, folder: Path, step: int) -> None:
        model = _objective(module).whole()
        run = self.config.run
        images = step * run.batch_size * run.accumulation * processes.world()
        stages = next_card(self._before, self.training.stage, self.config, step, images)
        card = {"recipe": self.config.recipe, **stages, **self.settings()}
        if self.training.lora:
            extras = {"base": self._base, "prompts": self._prompts_known, **self._words_known, "card": card}
            if self._changed_defaults:  # what the base's own defaults are not right for
                extras["defaults"] = dict(self._changed_defaults)
            save_adapter(model, folder.with_name(ADAPTER), self.training.lora, extras)
            return
        model.extras = {
            "defaults": self.defaults(),
            "sizes": [list(size) for size in self._sizes] if len(self._sizes) <= LISTED_SIZES else [],
            "prompts": self._prompts_known,
            **self._words_known,
            "card": card,
        }
        save_model(model, folder)


def open_sources(data: DataConfig) -> list[Source]:
    """The shards of a config, with their weights and without the samples that its conditions leave out."""
    if data.train:
        return [Source(ShardDataset(ShardIndex.open(data.train, data.keep)))]
    return [Source(ShardDataset(ShardIndex.open(source.places, data.keep)), source.weight) for source in data.sources]


def fresh_model(config: TrainingConfig, make: Callable[[torch.dtype], BitDanceModel]) -> BitDanceModel:
    """What `make(dtype)` returns, the dtype that of the run's weights, its new weights drawn from the run's seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.run.seed)
        return make(torch.bfloat16 if config.run.precision == "bfloat16-weights" else torch.float32)


def texts(sources: Sequence[Source], training: GeneratorTraining) -> list[str]:
    """All captions, and the lines of `generator.text_extra`: what a fresh text tokenizer learns from."""
    found: list[str] = []
    for data in (source.data for source in sources):
        for captions, _ in filter(None, (data.readable(data.caption, i) for i in range(len(data)))):
            found += captions
    if training.text_extra:
        found += text_lines(decoded(Path(training.text_extra).read_bytes(), training.text_extra))
    return found


def _objective(module: nn.Module) -> GeneratorObjective:
    assert isinstance(module, GeneratorObjective)
    return module
