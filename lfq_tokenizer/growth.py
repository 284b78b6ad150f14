"""A plain decoder becomes a generative one without a jump: its new inputs start at zero."""

import dataclasses

import torch

from lfq_tokenizer.tokenizer import LFQTokenizer


def grow_generative(tokenizer: LFQTokenizer) -> LFQTokenizer:
    """A tokenizer whose decoder reads noise beside the bits, and gives exactly what `tokenizer` gives whatever the noise.

    The first convolution gets as many new input channels as there are bits, all with zero weights, so the second training phase
    starts from the first one's reconstructions. ValueError when the decoder is generative already.
    Source: BitDance paper (arXiv 2602.14041), tokenizer section.
    """
    if tokenizer.config.gan_decoder:
        raise ValueError("this tokenizer's decoder is generative already; go on training it with the same config")
    with torch.device("meta"):
        grown = LFQTokenizer(dataclasses.replace(tokenizer.config, gan_decoder=True))
    state = dict(tokenizer.state_dict())
    weight = state["decoder.conv_in.weight"]
    state["decoder.conv_in.weight"] = torch.cat([weight, torch.zeros_like(weight)], dim=1)
    grown.load_state_dict({k: v.clone() for k, v in state.items()}, strict=True, assign=True)
    return grown.train(tokenizer.training)
