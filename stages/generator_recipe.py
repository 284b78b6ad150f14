"""Recipe 'generator': caption → bits, with a frozen tokenizer.

    loss = velocity loss of the head + text_weight · cross-entropy of the prompt's text

Shards hold pictures or, cheaper, bits that `bitdance tokenizer encode` wrote.
Source: BitDance paper (arXiv 2602.14041), training section.
"""

import dataclasses
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from bitdance.backbone import Backbone
from bitdance.checkpoint import load_model, save_model
from bitdance.generate import generate_bits
from bitdance.head import BinaryDiffusionHead, HeadConfig
from bitdance.model import BitDanceModel
from bitdance.picture import grid, to_pil
from bitdance.projector import Projector
from bitdance.prompt import add_image_tokens, build_text_tokenizer, conditional_ids, unconditional_ids
from bitdance.sequence import ImagePiece, TextPiece, TrainingBatch, build_batch
from lfq_tokenizer import LFQTokenizer
from stages.checkpoint import model_folder
from stages.config import GeneratorTraining, TrainingConfig
from stages.data.shards import ShardDataset, ShardIndex
from stages.recipe import Losses, Opponent
from stages.tokenizer.recipe import as_images

LISTED_SAMPLES = 20_000  # read at most, for the list of prompts in bitdance.json
LARGEST_SIDE = 4096  # pixels; the published vocabularies name sides up to this
PLACES = ("tokenizer", "pretrained", "init", "text_extra")  # of this machine; a model that is given away does not name them


class GeneratorObjective(nn.Module):
    """`TrainingBatch` → (loss, scalars). The tokenizer is not part of it: it is frozen and is not saved with the resume state."""

    def __init__(self, model: BitDanceModel, training: GeneratorTraining) -> None:
        super().__init__()
        self.model = BitDanceModel(None, model.text_tokenizer, model.projector, model.backbone, model.head)
        self._training = training

    def with_tokenizer(self, tokenizer: LFQTokenizer) -> BitDanceModel:
        """These weights as a whole model, in eval mode; its parts are shared."""
        m = self.model
        return BitDanceModel(tokenizer, m.text_tokenizer, m.projector, m.backbone, m.head).eval()

    def forward(self, batch: TrainingBatch, generator: torch.Generator, step: int) -> Losses:
        losses = self.model(batch, generator, flip_max=self._training.flip_max, text_weight=self._training.text_weight)
        return losses.total, {"vision": losses.vision.detach(), "text": losses.text.detach()}, None


class GeneratorRecipe:
    """See `recipe.Recipe`."""

    opponent: Opponent | None = None

    def __init__(self, config: TrainingConfig) -> None:
        self.config, self.training = config, config.generator
        self.data = ShardDataset(ShardIndex.open(config.data.train))
        self.heldout = ShardDataset(ShardIndex.open(config.data.heldout)) if config.data.heldout else None
        self.length, self.hash = len(self.data), self.data.index.hash
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.run.seed)
            model = self._model()
        assert model.tokenizer is not None
        self.tokenizer = model.tokenizer.eval().requires_grad_(False)
        self.text_tokenizer, self.special, self.patch_side = model.text_tokenizer, model.special, model.patch_side
        self.module = GeneratorObjective(model, self.training)

    def _model(self) -> BitDanceModel:
        t = self.training
        if t.init:
            return load_model(model_folder(t.init), device="cpu", dtype=torch.float32).train()
        if not t.tokenizer:
            raise ValueError("generator.tokenizer is empty; name a folder with ae_config.json and ae.safetensors")
        tokenizer = LFQTokenizer.from_pretrained(model_folder(t.tokenizer)).float()
        if bool(t.pretrained) == bool(t.backbone):
            raise ValueError("give exactly one of generator.pretrained (a folder) and [generator.backbone] (a Qwen3 config)")
        head = HeadConfig.from_dict(
            {"ch_target": tokenizer.config.z_channels, "ch_cond": self._hidden_size(), **t.head}
        )
        sides = t.resolution_tokens or LARGEST_SIDE // tokenizer.downsampling
        if t.pretrained:
            from transformers import AutoTokenizer

            text_tokenizer = add_image_tokens(
                AutoTokenizer.from_pretrained(t.pretrained, local_files_only=True), sides, head.parallel_num - 1
            )
            backbone = Backbone.from_pretrained(t.pretrained, torch.float32)
            if backbone.vocabulary_size < len(text_tokenizer):
                backbone.grow_vocabulary(len(text_tokenizer))
        else:
            text_tokenizer = add_image_tokens(
                build_text_tokenizer(self._texts(), t.text_vocabulary), sides, head.parallel_num - 1
            )
            backbone = Backbone.from_config({"model_type": "qwen3", **t.backbone, "vocab_size": len(text_tokenizer)})
        projector = Projector(head.ch_target, head.ch_cond)
        return BitDanceModel(tokenizer, text_tokenizer, projector, backbone, BinaryDiffusionHead(head))

    def _hidden_size(self) -> int:
        if self.training.backbone:
            return int(self.training.backbone["hidden_size"])
        from transformers import AutoConfig

        return int(AutoConfig.from_pretrained(self.training.pretrained, local_files_only=True).hidden_size)

    def _texts(self) -> list[str]:
        texts = [caption for i in range(len(self.data)) for caption in self.data.caption(i)[0]]
        if self.training.text_extra:
            texts += Path(self.training.text_extra).read_text(encoding="utf-8").splitlines()
        return texts

    def batch(self, indices: Sequence[int], generator: torch.Generator) -> TrainingBatch:
        """One document per sample: a caption of its list, drawn evenly, or none with probability `dropout`; then the picture."""
        samples = [self._sample(self.data, i) for i in indices]
        draws = torch.rand(len(samples), 2, generator=generator).tolist()
        documents = []
        for (captions, bits_Chw), (drop, pick) in zip(samples, draws, strict=True):
            caption = "" if drop < self.training.dropout else captions[int(pick * len(captions))]
            documents.append(self._document(caption, bits_Chw))
        return build_batch(documents, self.patch_side, self.special)

    def _document(self, caption: str, bits_Chw: Tensor) -> list[TextPiece | ImagePiece]:
        if caption:
            ids = conditional_ids(self.text_tokenizer, caption, self.training.max_text_tokens)
        else:
            ids = unconditional_ids(self.text_tokenizer)
        return [TextPiece(ids, predict=bool(caption)), ImagePiece(bits_Chw)]

    @torch.no_grad()
    def _sample(self, data: ShardDataset, index: int) -> tuple[list[str], Tensor]:
        """Captions and bits; pictures are encoded each time they come, so many epochs want shards of bits."""
        sample = data.take(index)
        if sample.bits_Chw is not None:
            return sample.captions, sample.bits_Chw
        assert sample.picture is not None
        return sample.captions, self.tokenizer.encode(as_images([sample.picture]))[0].to(torch.int8)

    @property
    def skipped(self) -> int:
        return len(self.data.broken)

    def describe(self, indices: Sequence[int]) -> list[str]:
        return [self.data.key(i) for i in indices]

    @torch.no_grad()
    def validate(self, module: nn.Module) -> dict[str, float]:
        """Losses on up to 256 held-out samples with their first caption, without flips, under a fixed seed."""
        if self.heldout is None:
            return {}
        stride = max(1, len(self.heldout) // 256)
        samples = [self._sample(self.heldout, i) for i in range(0, len(self.heldout), stride)][:256]
        model = _objective(module).model
        generator = torch.Generator().manual_seed(0)
        vision, text = [], []
        for start in range(0, len(samples), 64):
            documents = [self._document(captions[0], bits) for captions, bits in samples[start : start + 64]]
            batch = build_batch(documents, self.patch_side, self.special).to(model.backbone.device)
            losses = model(batch, generator, flip_max=0.0)
            vision.append(losses.vision_rows.flatten())
            text.append(losses.text_rows)
        return {"vision": float(torch.cat(vision).mean()), "text": float(torch.cat(text).mean())}

    def sample(self, module: nn.Module) -> Image.Image:
        """The run's fixed prompts with fixed seeds; its own generators, so that training is not disturbed."""
        prompts = list(self.training.sample_prompts) or [self.data.caption(i)[0][0] for i in range(min(8, self.length))]
        defaults = self._defaults()
        model = _objective(module).with_tokenizer(self.tokenizer)
        s = self.tokenizer.downsampling
        bits_BChw = generate_bits(
            model,
            prompts,
            defaults["height"] // s,
            defaults["width"] // s,
            defaults["num_inference_steps"],
            defaults["guidance_scale"],
            [torch.Generator().manual_seed(i) for i in range(len(prompts))],
        )
        with torch.no_grad():
            picture = grid(to_pil(self.tokenizer.decode(bits_BChw.cpu(), torch.Generator().manual_seed(0))))
        return picture

    def _defaults(self) -> dict[str, Any]:
        _, bits_Chw = self._sample(self.data, 0)
        s = self.tokenizer.downsampling
        size = {"height": bits_Chw.shape[1] * s, "width": bits_Chw.shape[2] * s}
        return {**size, "num_inference_steps": 20, "guidance_scale": 3.0, **self.training.defaults}

    @cached_property
    def _prompts_known(self) -> list[str]:
        """First caption of each distinct picture, where the shards say what a picture shows; else of the first samples."""
        known: dict[Any, str] = {}
        for index in range(min(self.length, LISTED_SAMPLES)):
            captions, attributes = self.data.caption(index)
            known.setdefault((attributes.get("concept", captions[0]), attributes.get("style")), captions[0])
        return list(known.values())

    def save_model(self, module: nn.Module, folder: Path) -> None:
        model = _objective(module).with_tokenizer(self.tokenizer)
        defaults = self._defaults()
        training = dataclasses.asdict(self.training)
        model.extras = {
            "defaults": defaults,
            "sizes": [[defaults["height"], defaults["width"]]],
            "prompts": self._prompts_known,
            "card": {"recipe": "generator", "training": {k: v for k, v in training.items() if k not in PLACES}},
        }
        save_model(model, folder)


def _objective(module: nn.Module) -> GeneratorObjective:
    assert isinstance(module, GeneratorObjective)
    return module
