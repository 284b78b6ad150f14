"""Does a teacher fit a student that did not grow out of it just now? Every refusal names both values."""

from pathlib import Path

import torch

from bitdance.folder.parts import HEAD_CONFIG, LM_CONFIG
from bitdance.foreign import load_text_tokenizer
from bitdance.heads.diffusion.network import HeadConfig
from bitdance.model import BitDanceModel
from bitdance.sequence.patches import patch_side
from distill.growth import check_sides
from lfq_tokenizer import LFQTokenizer
from lfq_tokenizer.json_file import read_config
from stages.recipes.chain import SHOWN, encoder_hash

BACKBONE = ("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")


def check_teacher(student: BitDanceModel, folder: Path, source: str) -> None:
    """The teacher in `folder`, which the config calls `source`, against a student that goes on.

    ValueError where its patches do not divide the student's, or its bits, picture tokenizer, backbone or words are others. Of the
    teacher's weights only the encoder is read.
    """
    head = read_config(folder / HEAD_CONFIG, HeadConfig.from_dict)
    check_sides(patch_side(head.parallel_num), student.patch_side)
    remedy = "name the model that the student grew out of, or leave generator.init empty"
    if head.ch_target != student.head.config.ch_target:
        raise ValueError(f"{source} has {head.ch_target} bits per token, the student {student.head.config.ch_target}; {remedy}")
    assert student.tokenizer is not None
    theirs, ours = (encoder_hash(t, torch.float32) for t in (LFQTokenizer.from_pretrained(folder), student.tokenizer))
    if theirs != ours:
        raise ValueError(
            f"{source} reads the bits of another picture tokenizer ({theirs[:SHOWN]}…) than the student ({ours[:SHOWN]}…); "
            f"{remedy}"
        )
    backbone, own = read_config(folder / LM_CONFIG, dict), student.backbone.lm.config.to_dict()
    for name in BACKBONE:
        if backbone.get(name) != own.get(name):
            raise ValueError(
                f"{source} has another backbone: {name} = {backbone.get(name)!r}, the student's is {own.get(name)!r}; {remedy}"
            )
    words = load_text_tokenizer(folder).get_vocab()
    known = student.text_tokenizer.get_vocab()
    if other := next((word for word, number in words.items() if known.get(word) != number), None):
        raise ValueError(
            f"{source} has another text tokenizer: {other!r} is token {words[other]}, the student's {known.get(other)}; {remedy}"
        )
