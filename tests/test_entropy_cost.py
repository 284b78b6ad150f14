"""The entropy loss is a small part of a training step, is computed in float32 under autocast too, and huge tables are refused."""

import json

import pytest
import torch
from torch import Tensor

from lfq_tokenizer import LookupFreeQuantizer, TokenizerConfig, binarize
from lfq_tokenizer.entropy import group_entropy
from stages.measure import entropy as script

AUTOCAST = [torch.bfloat16, torch.float16]


def latents(bits: int = 16) -> Tensor:
    return 0.01 * torch.randn(4, bits, 8, 8, generator=torch.Generator().manual_seed(0))


def test_the_yardstick_is_what_the_loss_computes():
    z = latents(10)
    for ours, wanted in zip(group_entropy(z, 1), script.plain_entropy(z), strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-5)
    for ours, wanted in zip(group_entropy(z, 2), script.plain_entropy(z, 2), strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-5)


def test_the_loss_of_256_bits_is_under_five_percent_of_a_training_step():
    row = script.measure_share(TokenizerConfig(64, (1, 1, 2, 2), 1, 256), groups=32, batch=4, side=64, repeats=1)
    assert 0 < row["share_cpu"] < script.PROMISE, row
    assert 0 < row["share_memory"] < script.PROMISE, row


def test_groups_make_the_loss_cheap():
    """Peak memory, which is exact; the ungrouped table of 2^12 codes against three groups of 2^4."""
    z = latents(12).requires_grad_()
    whole, grouped = (
        script.loss_cost(loss, z, repeats=1).peak_mb for loss in (script.plain_entropy, lambda z: group_entropy(z, 3))
    )
    table = 256 * 2**12 * 4 / 1e6  # samples × codes
    assert whole > 2 * table
    assert grouped < table / 20


def test_peak_memory_is_the_most_held_at_one_time():
    def work() -> None:
        for _ in range(3):
            torch.ones(250_000)  # 1 MB, let go each time
        held = [torch.ones(250_000) for _ in range(2)]
        del held

    assert script.peak_megabytes(work) == pytest.approx(2, abs=0.05)


@pytest.mark.parametrize("bits", [32, 64, 256])
def test_ungrouped_codes_beyond_two_to_the_18_are_refused_with_the_groups_allowed(bits):
    allowed = [g for g in (1, 2, 4, 8, 16, 32, 64, 128, 256) if g <= bits and bits // g <= 18]
    for refuse in (lambda: group_entropy(torch.zeros(1, bits, 2, 2), 1), lambda: LookupFreeQuantizer(bits)):
        with pytest.raises(ValueError) as caught:
            refuse()
        assert f"groups = 1 for {bits} bits; allowed are {allowed}" in str(caught.value)


def test_the_script_prints_costs_refusals_and_shares(capsys):
    small = {"--step-bits": 8, "--batch": 1, "--side": 16, "--ch": 32, "--repeats": 1}
    arguments = ["--bits", "8", "32", "--ch-mult", "1", "1", *(str(part) for pair in small.items() for part in pair)]
    assert script.main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [(r["bits"], r["groups"], r.get("form", "refused")) for r in found["loss"]] == [
        (8, 1, "definition"),
        (8, 1, "group_entropy"),
        (8, 8, "group_entropy"),
        (32, 1, "refused"),
        (32, 4, "group_entropy"),
        (32, 8, "group_entropy"),
    ]
    assert "allowed are [2, 4, 8, 16, 32]" in found["loss"][3]["refused"]
    assert found["share"][0]["step"]["cpu_ms"] > found["share"][0]["entropy"]["cpu_ms"] > 0
    assert script.main(arguments) == 0
    out = capsys.readouterr().out
    assert "refused" in out and "promise: under 5 % of a step" in out
    with pytest.raises(SystemExit):
        script.main(["--side", "60"])


# autocast


def figures(z: Tensor, groups: int) -> list[Tensor]:
    """Bits, losses, and the gradients of the losses, whose backward pass runs inside autocast where the forward pass does."""
    z = z.clone().requires_grad_()
    bits, q = LookupFreeQuantizer(z.shape[1], groups)(z)
    values = [q.entropy_per_sample, q.entropy_of_mean, q.commitment]
    return [bits.detach(), *values, *(torch.autograd.grad(v, z, retain_graph=True)[0] for v in values)]


@pytest.mark.parametrize("dtype", AUTOCAST)
@pytest.mark.parametrize("groups", [1, 2, 16])
def test_autocast_changes_no_number_of_the_quantizer(dtype, groups):
    expected = figures(latents(), groups)
    with torch.autocast("cpu", dtype):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype  # autocast is on
        found = figures(latents(), groups)
    for value, wanted in zip(found, expected, strict=True):
        assert value.dtype == torch.float32 and torch.equal(value, wanted)


def test_latents_in_half_precision_give_exact_bits_and_float32_losses():
    z = latents().bfloat16()
    expected = figures(z.float(), 2)
    with torch.autocast("cpu", torch.bfloat16):
        bits, *losses = figures(z, 2)
    assert torch.equal(bits, binarize(z))  # exactly ±1 where bfloat16 rounds z + (1 − z)
    for value, wanted in zip(losses[:3], expected[1:4], strict=True):
        assert value.dtype == torch.float32 and torch.equal(value, wanted)
    for value, wanted in zip(losses[3:], expected[4:], strict=True):
        torch.testing.assert_close(value.float(), wanted, rtol=1e-2, atol=float(1e-2 * wanted.abs().max()))


@pytest.mark.parametrize("dtype", AUTOCAST)
def test_a_nan_latent_raises_under_autocast(dtype):
    z = latents().to(dtype)
    z[1, 2, 3, 4] = float("nan")
    with torch.autocast("cpu", dtype), pytest.raises(ValueError, match="1 of 4096 values are NaN"):
        LookupFreeQuantizer(16, 2)(z.requires_grad_())
