"""Parity with recorded numbers: positions, projector, backbone, flips, masks and the packed training step."""

import dataclasses

import pytest
import torch
from golden_cases import GOLDEN, case, meta

from bitdance.heads.diffusion.network import BinaryDiffusionHead, HeadConfig
from bitdance.model import BitDanceModel
from bitdance.networks.backbone import Backbone
from bitdance.networks.projector import Projector
from bitdance.sequence.batch import ImagePiece, TextPiece, TrainingBatch, build_batch
from bitdance.sequence.mask import dense_mask
from bitdance.sequence.patches import PatchPlan
from bitdance.sequence.perturbation import perturb_bits
from bitdance.sequence.positions import sincos_2d
from bitdance.sequence.prompt import conditional_ids, unconditional_ids
from lfq_tokenizer import LFQTokenizer
from lfq_tokenizer.json_file import read_json
from lfq_tokenizer.weights import load_strict, read_safetensors

CHECKPOINT = GOLDEN / "t2i_ckpt"
HIDDEN = {"rtol": 0.0, "atol": 3e-5}  # PARITY.md
PACKED = ("packed/p4_mul1_perturb0.0", "packed/p4_mul2_perturb0.35")


def text_tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(CHECKPOINT, local_files_only=True)


def published_projector() -> Projector:
    projector = Projector(8, 64)
    load_strict(projector, read_safetensors(CHECKPOINT / "projector.safetensors"), "projector.safetensors")
    return projector


def published_model(repeats: int = 1) -> BitDanceModel:
    config = HeadConfig.from_dict(read_json(CHECKPOINT / "vision_head_config.json"))
    head = BinaryDiffusionHead(dataclasses.replace(config, diff_batch_mul=repeats))
    load_strict(head, read_safetensors(CHECKPOINT / "vision_head.safetensors"), "vision_head.safetensors")
    backbone = Backbone.from_pretrained(CHECKPOINT, dtype=torch.float32)
    tokenizer = LFQTokenizer.from_pretrained(CHECKPOINT).float()
    return BitDanceModel(tokenizer, text_tokenizer(), published_projector(), backbone, head)


@pytest.mark.parametrize(("h", "w", "p"), [(4, 4, 2), (4, 6, 2), (12, 8, 4)])
def test_positions(h: int, w: int, p: int) -> None:
    recorded = case("pos2d")[1][f"out.h{h}_w{w}_ps{p}"]
    torch.testing.assert_close(sincos_2d(*PatchPlan(h, w, p).coordinates(), 64), recorded, rtol=0, atol=1e-6)


def test_projector() -> None:
    tensors = case("projector")[1]
    torch.testing.assert_close(published_projector()(tensors["in.bits"]), tensors["out.out"], rtol=0, atol=1e-5)


@torch.no_grad()
def test_backbone_with_cache() -> None:
    """The prefix causal, then two blocks that see everything; also pins the rotary base, which config.json has at top
    level.
    """
    tensors = case("llm")[1]
    backbone = Backbone.from_pretrained(CHECKPOINT, dtype=torch.float32)
    cache = backbone.new_cache()
    for name in ("prefix", "block0", "block1"):
        hidden = backbone(tensors[f"in.{name}"], cache=cache, causal=name == "prefix")
        torch.testing.assert_close(hidden, tensors[f"out.{name}_out"], **HIDDEN)
    torch.testing.assert_close(cache.layers[0].keys, tensors["out.k_cache_layer0"], **HIDDEN)
    torch.testing.assert_close(cache.layers[0].values, tensors["out.v_cache_layer0"], **HIDDEN)


@torch.no_grad()
def test_backbone_in_one_call_under_the_block_causal_mask() -> None:
    tensors = case("llm")[1]
    names = ("prefix", "block0", "block1")
    embeds = torch.cat([tensors[f"in.{name}"] for name in names], dim=1)
    block = torch.tensor([[-1] * 7 + [0] * 4 + [1] * 4])
    backbone = Backbone.from_pretrained(CHECKPOINT, dtype=torch.float32)
    hidden = backbone(embeds, mask=dense_mask(torch.zeros_like(block), block))
    torch.testing.assert_close(hidden, torch.cat([tensors[f"out.{name}_out"] for name in names], dim=1), **HIDDEN)


@pytest.mark.parametrize("name", ["flip/t2i", "flip/p0"])
def test_flips(name: str) -> None:
    """From the recorder's seed; the next draw shows that r1 and r2, and nothing else, were drawn."""
    about, tensors = case(name)
    generator, twin = (torch.Generator().manual_seed(about["seed"]) for _ in range(2))
    assert torch.equal(perturb_bits(tensors["in.x"], about["p_max"], generator), tensors["out.out"])
    assert torch.equal(torch.stack([torch.rand(r.shape, generator=twin) for r in tensors["draw0"]]), tensors["draw0"])
    assert torch.equal(torch.rand(4, generator=generator), torch.rand(4, generator=twin))


def split_ids(split_lens: list[int], modes: list[str], document_lens: list[int], P: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(doc_1L, block_1L) of a recorded layout: in a 'parallel' split, blocks of P are counted from its third token
    on.
    """
    doc = [d for d, length in enumerate(document_lens) for _ in range(length)]
    block: list[int] = []
    for k, (length, mode) in enumerate(zip(split_lens, modes, strict=True)):
        block += [1000 * k + (i - 2) // P if mode == "parallel" and i >= 2 else -1 for i in range(length)]
    return torch.tensor([doc]), torch.tensor([block])


@pytest.mark.parametrize("name", ["mask/two_docs_p4", "mask/three_docs_p16", *PACKED])
def test_mask(name: str) -> None:
    about, tensors = case(name)
    documents = about["sample_lens"] if name in PACKED else about["document_lens"]
    doc, block = split_ids(about["split_lens"], about["attn_modes"], documents, about["parallel_num"])
    assert torch.equal(dense_mask(doc, block)[0, 0], tensors["out.mask"].bool())


def recorded_batch(name: str, model: BitDanceModel) -> TrainingBatch:
    """The recorded index tensors as a TrainingBatch: one row, documents A and B with a generated image, C with an
    input.
    """
    about, tensors = case(name)
    L, P = about["sequence_length"], about["parallel_num"]
    ids = torch.zeros(L, dtype=torch.long)
    ids[tensors["in.packed_text_indexes"]] = tensors["in.packed_text_ids"]
    doc, block = split_ids(about["split_lens"], about["attn_modes"], about["sample_lens"], P)
    bits, rows, cols, generated = [], [], [], []
    for k in range(3):
        bits_BChw = model.tokenizer.encode(tensors[f"in.image{k}"])
        plan = PatchPlan(*bits_BChw.shape[2:], model.patch_side)
        bits.append(plan.order(bits_BChw)[0])
        row, col = plan.coordinates()
        rows.append(row)
        cols.append(col)
        generated.append(torch.full(row.shape, k < len(about["gen_vit_latent_shapes"])))
    return TrainingBatch(
        ids_BL=ids[None],
        doc_BL=doc,
        block_BL=block,
        position_BL=tensors["in.packed_position_ids"][None],
        image_index_N=tensors["in.packed_vit_token_indexes"],
        image_bits_NC=torch.cat(bits),
        image_row_N=torch.cat(rows),
        image_col_N=torch.cat(cols),
        image_N=torch.cat([torch.full((len(row),), k) for k, row in enumerate(rows)]),
        generated_K=torch.cat(generated).nonzero().flatten(),
        predict_index_K=tensors["in.ce_loss_indexes_vision"],
        label_index_T=tensors["in.ce_loss_indexes_text"],
        label_ids_T=tensors["in.packed_label_ids"],
    )


def replay(monkeypatch: pytest.MonkeyPatch, name: str) -> list[torch.Tensor]:
    """Recorded draws in place of torch.rand and torch.randn; what is left of the list was not drawn."""
    tensors = case(name)[1]
    draws = [*tensors["draw0"], *tensors["draw1"], *tensors["draw2"]]
    kinds = ["rand", "rand", "randn", "randn"]

    def double(kind: str):
        def draw(*size, **kwargs) -> torch.Tensor:
            shape = tuple(size[0]) if len(size) == 1 and not isinstance(size[0], int) else size
            assert kinds.pop(0) == kind and shape == tuple(draws[0].shape)
            return draws.pop(0)

        return draw

    monkeypatch.setattr(torch, "rand", double("rand"))
    monkeypatch.setattr(torch, "randn", double("randn"))
    return draws


PUBLISHED_NAMES = {
    "embed_vision_mlp.": "projector.",
    "llm_model.": "backbone.lm.",
    "vision_diffusion_head.": "head.",
}


def ours(published: str) -> str:
    prefix = next(prefix for prefix in PUBLISHED_NAMES if published.startswith(prefix))
    return PUBLISHED_NAMES[prefix] + published.removeprefix(prefix)


@pytest.mark.parametrize("name", PACKED)
def test_packed_training_step(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inputs, hidden states, losses, gradients and the norm of every gradient of three packed documents."""
    about, tensors = case(name)
    model = published_model(about["diff_batch_mul"])
    model.tokenizer.requires_grad_(False)
    batch = recorded_batch(name, model)
    seen = {}
    model.backbone.register_forward_hook(lambda module, inputs, output: seen.update(llm_in=inputs[0], llm_out=output))
    draws = replay(monkeypatch, name)
    losses = model(batch, flip_max=about["vision_perturb"], text_weight=1.0)
    assert draws == []
    torch.testing.assert_close(seen["llm_in"], tensors["out.llm_in"], **HIDDEN)
    torch.testing.assert_close(seen["llm_out"], tensors["out.llm_out"], **HIDDEN)
    torch.testing.assert_close(losses.text_rows, tensors["out.ce_loss_text"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(losses.vision_rows, tensors["out.ce_loss_vision"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(losses.total, tensors["out.loss_text_plus_vision"], rtol=1e-5, atol=0)

    losses.total.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    for key in tensors:
        if key.startswith("out.grad."):
            torch.testing.assert_close(gradients[ours(key.removeprefix("out.grad."))], tensors[key], rtol=1e-4, atol=2e-5)
    norms = {ours(published): norm for published, norm in about["grad_norms"].items()}
    assert norms.keys() == gradients.keys()
    for parameter, norm in norms.items():
        assert float(gradients[parameter].norm()) == pytest.approx(norm, rel=1e-4), parameter


def test_build_batch_lays_out_the_recorded_documents() -> None:
    """Same tokens, places, blocks, labels; ours closes document B, whose last token nothing sees and nothing
    predicts.
    """
    name = PACKED[0]
    tensors = case(name)[1]
    model = published_model()
    tokenizer = model.text_tokenizer
    bits = [model.tokenizer.encode(tensors[f"in.image{k}"])[0] for k in range(3)]
    prompt = conditional_ids(tokenizer, "a red cube on a table")
    caption = tensors["in.packed_text_ids"][-6:].tolist()
    assert caption[-1] == model.special.im_end
    documents = [
        [
            TextPiece(prompt[:2]),
            TextPiece(prompt[2:], predict=True),
            ImagePiece(bits[0]),
            TextPiece([caption[-1]], True),
        ],
        [TextPiece(unconditional_ids(tokenizer), predict=True), ImagePiece(bits[1])],
        [ImagePiece(bits[2], generated=False), TextPiece(caption[:1]), TextPiece(caption[1:], predict=True)],
    ]
    batch = build_batch(documents, model.patch_side, model.special, token_budget=95)
    recorded = recorded_batch(name, model)

    keep = torch.ones(95, dtype=torch.bool)
    keep[76] = False  # vision_end of document B
    assert batch.ids_BL[0, 76] == model.special.vision_end
    place = keep.cumsum(0) - 1  # flat index of ours → of the recorded
    for field in ("ids_BL", "doc_BL", "position_BL"):
        assert torch.equal(getattr(batch, field)[:, keep], getattr(recorded, field)), field
    ours_mask = dense_mask(batch.doc_BL, batch.block_BL)[0, 0]
    assert torch.equal(ours_mask[keep][:, keep], tensors["out.mask"].bool())
    for field in ("image_index_N", "predict_index_K", "label_index_T"):
        assert torch.equal(place[getattr(batch, field)], getattr(recorded, field)), field
    for field in ("image_bits_NC", "image_row_N", "image_col_N", "generated_K", "label_ids_T"):
        assert torch.equal(getattr(batch, field), getattr(recorded, field)), field


def test_every_encoding_of_a_prompt() -> None:
    """Pieces without special-token parsing give the ids of the whole recorded template."""
    tokenizer = text_tokenizer()
    for recorded in meta()["tokenizer"]["encodings"]:
        _, user, rest = recorded["text"].partition("user\n")
        prompt = rest.removesuffix("<|im_end|>\n<|im_start|>assistant\n")
        assert (conditional_ids(tokenizer, prompt) if user else unconditional_ids(tokenizer)) == recorded["ids"]
