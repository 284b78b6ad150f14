"""The autoencoders of the comparison (`compare.py`): equal networks, pictures and steps around each bottleneck."""

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from lfq_tokenizer import TokenizerConfig
from lfq_tokenizer.decoder import Decoder
from lfq_tokenizer.encoder import Encoder
from lfq_tokenizer.json_file import read_json, write_json
from lfq_tokenizer.weights import read_safetensors, write_safetensors
from stages.config import OptimizerConfig, TokenizerTraining
from stages.data.shards import ShardDataset, ShardIndex
from stages.engine.learner import learning_rate
from stages.engine.loader import step_generator
from stages.measure.bottlenecks import build_bottleneck


@dataclass(frozen=True)
class Setting:
    """What all runs share. Written beside the results, so that a figure can be traced."""

    ch: int = 64
    ch_mult: tuple[int, ...] = (1, 1, 2, 2)
    num_res_blocks: int = 1
    crop: int = 32
    batch_size: int = 16
    steps: int = 1000
    lr: float = 1.5e-3
    warmup_steps: int = 50
    l1_weight: float = 1.0
    l2_weight: float = 1.0
    entropy_weight: float = 0.02
    commitment_weight: float = 0.05
    seed: int = 0


# The first ones first: a table can be made before the last run is done.
RUNS: tuple[tuple[str, int], ...] = (
    *((name, bits) for bits in (16, 32) for name in ("lfq", "fsq", "bsq", "rvq", "vq", "hbq", "multi_scale")),
    ("hbq", 64),
    ("lfq", 64),
    ("continuous", 64),
    ("lfq", 128),
    ("lfq", 8),
    ("lfq", 256),
    ("continuous", 128),
    ("continuous", 32),
    ("continuous", 16),
    ("continuous", 256),
    ("continuous-width", 64),
    ("bsq", 64),
    ("fsq", 64),
    ("rvq", 64),
)


class Autoencoder(nn.Module):
    """Encoder → bottleneck → decoder. `forward(images_B3HW) -> (out_B3HW, loss of the bottleneck)`."""

    def __init__(self, name: str, bits: int, setting: Setting) -> None:
        super().__init__()
        weights = TokenizerTraining(entropy_weight=setting.entropy_weight, commitment_weight=setting.commitment_weight)
        bottleneck = build_bottleneck(name, bits, weights, setting.seed)
        config = TokenizerConfig(setting.ch, setting.ch_mult, setting.num_res_blocks, bottleneck.channels)
        self.bits = bottleneck.bits
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(setting.seed)
            self.encoder, self.decoder = Encoder(config), Decoder(config)
        self.quantize = bottleneck.quantize

    def forward(self, images_B3HW: Tensor) -> tuple[Tensor, Tensor]:
        codes_BChw, loss = self.quantize(self.encoder(images_B3HW))
        return self.decoder(codes_BChw), loss


def load_pictures(groups: Sequence[Sequence[str]]) -> list[Tensor]:
    """Per group of shards all its pictures, (K,3,H,W) uint8; pictures of one size."""
    pictures = []
    for shards in groups:
        data = ShardDataset(ShardIndex.open(list(shards)))
        numbers = tqdm(range(len(data)), disable=None, desc="reading", unit="picture")
        samples = filter(None, (data.readable(data.__getitem__, i) for i in numbers))
        found = [np.asarray(sample.picture) for sample in samples if sample.picture is not None]
        if not found:
            raise ValueError(f"{' '.join(shards)} hold no picture that can be read; see `bitdance data inspect`")
        array_KHW3 = np.stack(found)
        pictures.append(torch.from_numpy(array_KHW3).permute(0, 3, 1, 2).contiguous())
    return pictures


def _batch(groups: Sequence[Tensor], setting: Setting, step: int) -> Tensor:
    """Equal shares of every group, cropped and mirrored; a function of seed and step alone."""
    generator = step_generator(setting.seed, step, 0)
    share, crop = setting.batch_size // len(groups), setting.crop
    parts = []
    for pictures in groups:
        for index in torch.randint(len(pictures), (share,), generator=generator).tolist():
            H, W = pictures.shape[2:]
            y, x = (int(torch.randint(side - crop + 1, (), generator=generator)) for side in (H, W))
            part = pictures[index, :, y : y + crop, x : x + crop]
            parts.append(part.flip(2) if torch.rand((), generator=generator) < 0.5 else part)
    return torch.stack(parts).float() / 127.5 - 1


def train_one(name: str, bits: int, groups: Sequence[Tensor], setting: Setting, folder: Path) -> None:
    """Train one autoencoder and write `NAME-BITS.safetensors` and `.json`; nothing is left of a run that was interrupted."""
    model = Autoencoder(name, bits, setting).train().to(memory_format=torch.channels_last)
    schedule = OptimizerConfig(lr=setting.lr, warmup_steps=setting.warmup_steps, schedule="cosine")
    optimizer = torch.optim.AdamW(model.parameters(), lr=setting.lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    torch.manual_seed(setting.seed)  # the package draws from the global generator
    started, cpu = time.monotonic(), time.process_time()
    bar = tqdm(range(setting.steps), disable=None, desc=f"{name} {bits}", mininterval=10)
    l1_sum = 0.0
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(schedule, step, setting.steps)
        images = _batch(groups, setting, step).contiguous(memory_format=torch.channels_last)
        out, own = model(images)
        l1, l2 = (out - images).abs().mean(), (out - images).square().mean()
        loss = setting.l1_weight * l1 + setting.l2_weight * l2 + own
        if not torch.isfinite(loss):
            raise FloatingPointError(f"{name} at {bits} bits: loss is {loss.item()} at step {step}")
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        l1_sum = 0.98 * l1_sum + 0.02 * float(l1.detach())
    state = {k: v.contiguous() for k, v in model.state_dict().items()}
    write_safetensors(state, folder / f"{name}-{bits}.safetensors")
    seconds = {"seconds": time.monotonic() - started, "cpu_seconds": time.process_time() - cpu}
    facts = {"name": name, "bits": model.bits, "l1": l1_sum, **seconds, "torch": torch.__version__}
    write_json({**facts, "setting": dataclasses.asdict(setting)}, folder / f"{name}-{bits}.json")


def load_one(path: Path) -> tuple[Autoencoder, dict]:
    """A trained autoencoder and its facts, from its `.json`."""
    facts = read_json(path)
    values = facts["setting"]
    setting = Setting(**{**values, "ch_mult": tuple(values["ch_mult"])})
    model = Autoencoder(facts["name"], int(path.stem.rpartition("-")[2]), setting)
    model.load_state_dict(read_safetensors(path.with_suffix(".safetensors")), strict=True)
    return model.eval(), facts
