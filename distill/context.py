"""What the teacher needs to work ahead of training: the row of samples and the student's layout, without a student."""

import dataclasses
from typing import Any

import torch

from bitdance.folder.checkpoint import load_model
from bitdance.folder.fingerprint import fingerprint
from bitdance.folder.sizes import rule_of_model
from bitdance.model import BitDanceModel
from bitdance.sequence.patches import patch_side
from bitdance.sequence.prompt import SpecialTokens
from distill.config import DistillConfig
from distill.growth import check_sides, grown_text_tokenizer
from distill.teacher import own_device
from lfq_tokenizer import LFQTokenizer
from stages.data.buckets import Buckets
from stages.data.mixture import Mixture
from stages.engine.checkpoint import model_folder
from stages.recipes.chain import check_bits, check_chain
from stages.recipes.generator.documents import Documents
from stages.recipes.generator.recipe import open_sources
from stages.recipes.tokenizer.coding import weights_hash


class TeacherContext:
    """`teacher` on its device and in its dtype, the `mixture` of real pictures, and `documents` as the student reads them.

    ValueError where teacher, data and config do not fit.
    """

    def __init__(self, config: DistillConfig) -> None:
        self.distill, self.seed = config.distill, config.run.seed
        folder, training, P = model_folder(self.distill.teacher), config.generator, config.block_size
        self.device = own_device(self.distill) or torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.teacher: BitDanceModel = load_model(folder, self.device, self.distill.torch_dtype(self.device))
        self.fingerprint = fingerprint(folder)
        check_sides(self.teacher.patch_side, patch_side(P))
        own = dataclasses.replace(training, head={**training.head, "parallel_num": self.teacher.block_size})
        head = check_chain(self.teacher, own, None, f"distill.teacher = {self.distill.teacher!r}")
        self.head = dataclasses.replace(head, parallel_num=P)
        # bits must not depend on the teacher's precision
        self.tokenizer = LFQTokenizer.from_pretrained(folder).float().to(self.device).eval()
        self.sources = open_sources(config.data)
        for source in self.sources:
            check_bits([shard.address for shard in source.data.index.shards], self.tokenizer)
        mix = {int(resolution): share for resolution, share in config.data.mix.items()}
        rule = dataclasses.replace(rule_of_model(self.teacher), trained=(), patch_side=patch_side(P))
        self.buckets = Buckets(rule, tuple(mix))
        self.mixture = Mixture(self.sources, self.seed, mix, self.buckets, config.data.enlarge)
        text_tokenizer = grown_text_tokenizer(self.teacher, P)
        special = SpecialTokens.from_tokenizer(text_tokenizer)
        self.documents = Documents(text_tokenizer, special, self.tokenizer, self.head, self.buckets, training, 0, 1)

    def origin(self) -> dict[str, Any]:
        """For `pack.json`: who made these shards, and which encoder's bits they hold."""
        encoder = {"sha256": weights_hash(self.tokenizer.encoder), "dtype": "torch.float32"}
        return {"teacher": self.fingerprint, "guidance": self.distill.guidance, "encoder": encoder}
