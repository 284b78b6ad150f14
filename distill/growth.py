"""Growth: a model of p × p patches becomes the starting point of one of kp × kp patches.

Nothing inside the networks knows the patch side: the head attends to however many tokens a block has, and the order of the
tokens follows from the plan. What has to grow is the prefix: block 0 is `<|res_w|> <|query_1|> … <|query_{P-1}|>`, one token for
each place of a patch, and the hidden state of place i predicts token i of the first patch.

p, kp patch sides before and after, P = (kp)² tokens per block, V vocabulary, D hidden size.
"""

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bitdance.folder.sizes import rule_of_model
from bitdance.model import BitDanceModel
from bitdance.sequence.prompt import SpecialTokens, add_image_tokens


@torch.no_grad()
def grow(model: BitDanceModel, patch_side: int, teacher: Mapping[str, Any] | None = None) -> BitDanceModel:
    """`model` with patches of `patch_side`, a multiple of its own. Its parts are taken over and changed, not copied.

    All query tokens, old ones too, are laid out anew by `prefix_weights`, in the embedding and, where it is not tied, in the
    output head: query i now stands at another place of the patch. Everything else keeps its weights. `teacher` is what
    `extras["card"]["teacher"]` will say of the model that this one came from; sizes that the larger patch does not divide are
    dropped from `extras`. ValueError where the patch side is no multiple.
    """
    old = model.patch_side
    check_sides(old, patch_side)
    P = patch_side**2
    text_tokenizer = grown_text_tokenizer(model, P)
    backbone, head = model.backbone, model.head
    if backbone.vocabulary_size < len(text_tokenizer):
        backbone.grow_vocabulary(len(text_tokenizer))
    special = SpecialTokens.from_tokenizer(text_tokenizer)
    for table_VD in _tables(backbone.lm):
        table_VD[list(special.query_ids[: P - 1])] = _queries(table_VD, special, old, patch_side).to(table_VD.dtype)
    head.config = dataclasses.replace(head.config, parallel_num=P)
    grown = BitDanceModel(model.tokenizer, text_tokenizer, model.projector, backbone, head).train(model.training)
    grown.extras = _extras(grown, model.extras, teacher)
    return grown


def grown_text_tokenizer(model: BitDanceModel, P: int) -> Any:
    """A copy of the model's text tokenizer with the query tokens of blocks of P tokens."""
    return add_image_tokens(copy.deepcopy(model.text_tokenizer), len(model.special.res_ids), P - 1)


def check_sides(old: int, new: int) -> None:
    """ValueError unless patches of side `new` are made of whole patches of side `old`."""
    if new <= old or new % old:
        allowed = ", ".join(f"{k * old} ({(k * old) ** 2} tokens per step)" for k in (2, 3, 4))
        raise ValueError(
            f"a patch side of {new} ({new**2} tokens per step) is no multiple of the teacher's {old} ({old**2} tokens per step); "
            f"possible are {allowed}, …"
        )


def prefix_weights(old: int, new: int) -> Tensor:
    """(new² − 1, old² − 1) float32: how each new query token mixes the old ones; rows sum to 1.

    Both patches are laid over one another, corner on corner, and the value at a new place is interpolated bilinearly between the
    old ones. Place 0 is not a query but `<|res_w|>`, whose embedding says how wide the picture is, so it takes no part: the
    weights of a place beside that corner are scaled up to 1.
    """
    line = torch.zeros(new, old)
    for place in range(new):
        at = place * (old - 1) / (new - 1)
        below = min(int(at), old - 2)
        line[place, below], line[place, below + 1] = 1 - (at - below), at - below
    weights = torch.kron(line, line)[1:, 1:]
    return weights / weights.sum(1, keepdim=True)


def _queries(table_VD: Tensor, special: SpecialTokens, old: int, new: int) -> Tensor:
    if old == 1:  # no query yet: <|res_w|> alone did their work, in as many versions as there are widths
        return table_VD[list(special.res_ids)].float().mean(0).expand(new**2 - 1, -1)
    return prefix_weights(old, new).to(table_VD.device) @ table_VD[list(special.query_ids[: old**2 - 1])].float()


def _tables(lm: nn.Module) -> list[Tensor]:
    """The embedding, and the output head where it has weights of its own."""
    embedding, output = lm.get_input_embeddings().weight, lm.get_output_embeddings().weight
    return [embedding] if output is embedding else [embedding, output]


def _extras(grown: BitDanceModel, extras: Mapping[str, Any], teacher: Mapping[str, Any] | None) -> dict[str, Any]:
    rule = dataclasses.replace(rule_of_model(grown), trained=()) if grown.tokenizer is not None else None
    kept = dict(extras)
    if rule is not None and "sizes" in kept:
        kept["sizes"] = [size for size in kept["sizes"] if rule.allows(*size)]
    defaults = dict(kept.get("defaults", {}))
    if rule is not None and {"height", "width"} <= defaults.keys() and not rule.allows(defaults["height"], defaults["width"]):
        del defaults["height"], defaults["width"]
    if defaults:
        kept["defaults"] = defaults
    if teacher is not None:
        kept["card"] = {**kept.get("card", {}), "teacher": dict(teacher)}
    return kept
