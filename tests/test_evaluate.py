"""Benchmarks and scores: layouts that the scripts read, sets without gaps, arithmetic equal to torch-fidelity's, provenance."""

import json
import re
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from class_model import golden_model, golden_tokenizer
from PIL import Image
from torch import nn

from bitdance.folder.picture_model import PictureModel
from bitdance.jobs.npz import NAME
from bitdance.jobs.prompt_file import PromptFile
from bitdance.kinds.class_patch.folder import LAYOUT
from bitdance.sequence.classes import ClassEntry, ClassNames
from lfq_tokenizer.lock import FolderLock
from stages import cli
from stages.evaluate import features, score
from stages.evaluate.compare import side_by_side
from stages.evaluate.features import Looker, Seen, looker_of
from stages.evaluate.figure import Figure, read_figures, write_figures
from stages.evaluate.samples import Pictures
from stages.evaluate.scores import Gaussian, frechet, inception_score, precision_recall
from stages.evaluate.sets import BENCHMARKS, request_lines

NAMES = ClassNames(tuple(ClassEntry((f"thing {i}",)) for i in range(10)))
QUICK = ["--steps", "1", "--guidance", "1", "-q"]


def given() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Features of 300 and 260 pictures, and logits of 1,000."""
    g = torch.Generator().manual_seed(0)
    mix = torch.randn(16, 16, generator=g)
    one = torch.randn(300, 16, generator=g) @ mix
    other = torch.randn(260, 16, generator=g) @ mix * 0.8 + 0.3
    return one, other, 3 * torch.randn(1000, 20, generator=g)


# arithmetic


def test_scores_are_those_of_torch_fidelity_on_the_same_features() -> None:
    """Recorded with torch-fidelity 0.4.0: its fid_statistics_to_metric, isc_features_to_metric (10 splits, not shuffled) and
    calculate_precision_recall_full (k = 3)."""
    one, other, logits = given()
    assert frechet(Gaussian.of(one), Gaussian.of(other)) == pytest.approx(14.468961450964343, abs=1e-3)
    assert inception_score(logits, 100, None) == pytest.approx((5.551674953402513, 0.19957533822199328), abs=1e-6)
    assert precision_recall(other, one) == pytest.approx((0.5533333420753479, 0.9884615540504456), abs=1e-6)
    assert precision_recall(one, other) == pytest.approx((0.9884615540504456, 0.5533333420753479), abs=1e-6)


def test_scores_are_the_formulas_of_the_adm_evaluator() -> None:
    one, other, logits = given()
    a, b = one.double().numpy(), other.double().numpy()
    ca, cb = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = np.sqrt(np.linalg.eigvals(ca @ cb).astype(complex)).real.sum()
    plain = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(ca) + np.trace(cb) - 2 * root
    assert frechet(Gaussian.of(one), Gaussian.of(other)) == pytest.approx(plain, abs=1e-6)
    p = logits.double().softmax(1).numpy()
    parts = [p[i : i + 300] for i in range(0, 1000, 300)]  # the last one is smaller
    scores = [np.exp(np.mean(np.sum(q * (np.log(q) - np.log(q.mean(0, keepdims=True))), 1))) for q in parts]
    assert inception_score(logits, 300, None) == pytest.approx((np.mean(scores), np.std(scores)), abs=1e-9)
    distance = ((a[:, None] - a[None]) ** 2).sum(-1)
    reach = np.sort(distance, axis=1)[:, 3]
    inside = (((b[:, None] - a[None]) ** 2).sum(-1) <= reach).any(1).mean()
    assert precision_recall(one, other)[0] == pytest.approx(inside, abs=1e-6)


def test_equal_and_singular_clouds() -> None:
    one, _, _ = given()
    assert frechet(Gaussian.of(one), Gaussian.of(one)) == pytest.approx(0, abs=1e-6)
    few = Gaussian.of(one[:5])  # of rank 4
    assert np.isfinite(frechet(few, Gaussian.of(one))) and precision_recall(one, one) == (1.0, 1.0)
    with pytest.raises(ValueError, match="at least 2"):
        Gaussian.of(one[:1])
    with pytest.raises(ValueError, match="16 features against 8"):
        frechet(Gaussian.of(one), Gaussian.of(one[:, :8]))
    with pytest.raises(ValueError, match="more than k = 3"):
        precision_recall(one[:3], one)


def test_the_order_of_samples_does_not_decide_the_inception_score() -> None:
    logits = torch.full((1000, 10), -5.0)
    logits[torch.arange(1000), torch.arange(1000) // 100] = 5.0  # sorted by class
    assert inception_score(logits, 100, None)[0] < 1.1  # every part is of one class
    sure = logits.double().softmax(1)
    best = float((sure * (sure.log() - sure.mean(0).log())).sum(1).mean().exp())
    assert inception_score(logits, 100, 0)[0] == pytest.approx(best, rel=0.1)
    mixed = logits[torch.randperm(1000, generator=torch.Generator().manual_seed(1))]
    assert inception_score(mixed, 100, 0)[0] == pytest.approx(inception_score(logits, 100, 0)[0], rel=0.05)


class _Inception(nn.Module):
    """What is asked of torch-fidelity's network."""

    def __init__(self) -> None:
        super().__init__()
        self.Mixed_6d = SimpleNamespace(branch1x1=nn.Conv2d(3, 192, 1))
        torch.manual_seed(0)

    def _torch_fidelity_forward(self, levels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = levels.float()[:, :, :17, :17] / 255
        self.Mixed_6d.branch1x1(x)
        return x.mean(dim=(2, 3)).repeat(1, 4), x.mean(dim=(2, 3)).repeat(1, 3)


def test_inception_gives_pool_logits_and_the_map_of_sfid() -> None:
    network = _Inception()
    levels = torch.randint(0, 256, (2, 3, 20, 20), dtype=torch.uint8)
    seen = looker_of(network).look(levels)
    assert seen.pool_NF.shape == (2, 12) and seen.logits_NC is not None and seen.logits_NC.shape == (2, 9)
    whole = network.Mixed_6d.branch1x1(levels.float()[:, :, :17, :17] / 255)
    assert seen.spatial_NF is not None and seen.spatial_NF.shape == (2, 2023)
    torch.testing.assert_close(seen.spatial_NF, whole[:, :7].permute(0, 2, 3, 1).reshape(2, -1))


# benchmarks


def test_geneval_dpg_and_hps_are_laid_out_as_their_scripts_read_them(tmp_path: Path) -> None:
    lines = ['{"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"}']
    lines += ['{"tag": "colors", "include": [], "prompt": "a photo of a blue cow"}']
    (tmp_path / "evaluation_metadata.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "dpg").mkdir()
    for name, text in (("COCOval_1", " a dog on a mat \n"), ("partiprompts99", "two cats")):
        (tmp_path / "dpg" / f"{name}.txt").write_text(text)
    (tmp_path / "hps").mkdir()
    (tmp_path / "hps" / "anime.json").write_text('["a girl", "a boy"]')
    (tmp_path / "hps" / "benchmark_photo.json").write_text('["a lake"]')
    sources = {"geneval": tmp_path / "evaluation_metadata.jsonl", "dpg": tmp_path / "dpg", "hps": tmp_path / "hps"}
    for name, source in sources.items():
        benchmark = BENCHMARKS[name]
        items, n = benchmark.items(source), benchmark.pictures
        rows = [json.loads(line) for line in request_lines(items, n, 7).splitlines()]
        seeds = [seed for row in rows for seed in range(row["seed"], row["seed"] + row["n"])]
        assert seeds == list(range(7, 7 + n * len(items)))  # every picture has its own
        for k, item in enumerate(items):
            files = [tmp_path / f"{name}-{k}-{j}.png" for j in range(n)]
            for j, file in enumerate(files):
                Image.new("RGB", (8, 6), (40 * k, 40 * j, 200)).save(file)
            benchmark.lay_out(item, files, tmp_path / "out" / name)
    out = tmp_path / "out"
    assert (out / "geneval/00001/metadata.jsonl").read_text() == lines[1] + "\n"
    assert sorted(p.name for p in (out / "geneval/00000/samples").iterdir()) == [f"{j:04d}.png" for j in range(4)]
    with Image.open(out / "geneval/00001/samples/0002.png") as picture:
        assert picture.getpixel((0, 0)) == (40, 80, 200)
    assert sorted(p.name for p in (out / "dpg").iterdir()) == ["COCOval_1.png", "partiprompts99.png"]
    with Image.open(out / "dpg/partiprompts99.png") as sheet:
        assert sheet.size == (16, 12) and sheet.getpixel((0, 0)) == (40, 0, 200) and sheet.getpixel((15, 11)) == (40, 120, 200)
    assert BENCHMARKS["dpg"].items(tmp_path / "dpg")[0].prompt == "a dog on a mat"
    assert sorted(str(p.relative_to(out / "hps")) for p in (out / "hps").rglob("*.jpg")) == [
        "anime/00000.jpg", "anime/00001.jpg", "photo/00000.jpg",
    ]  # fmt: skip


def test_prompts_keep_their_letters_and_lines_their_numbers(tmp_path: Path) -> None:
    """U+2028 and U+0085 end no line, blank lines count."""
    path = tmp_path / "evaluation_metadata.jsonl"
    path.write_text('\n{"prompt": "a \u2028fox\u0085"}\n\n{"prompt": "two"}\n')
    assert [(item.id, item.prompt) for item in BENCHMARKS["geneval"].items(path)] == [
        ("00000", "a \u2028fox\u0085"), ("00001", "two"),
    ]  # fmt: skip
    path.write_text('\n{"prompt": "a"}\n\n{"text": "b"}\n')
    with pytest.raises(ValueError, match="line 4"):
        BENCHMARKS["geneval"].items(path)


def test_a_name_of_a_prompt_is_that_of_its_pictures(tmp_path: Path) -> None:
    """Whatever the user's files are called, `bitdance generate` writes what is looked for afterwards."""
    names = ("a b", "-x", "é", "e\u0301", "." + "y" * 200, "z" * 200)
    for name in names:
        (tmp_path / f"{name}.txt").write_text("a fox")
    (tmp_path / "long.json").write_text(json.dumps({"s" * 118: ["a fox", "a dog"]}))
    for name, source in (("dpg", tmp_path), ("hps", tmp_path / "long.json")):
        items = BENCHMARKS[name].items(source)
        path = tmp_path / f"{name}.jsonl"
        path.write_text(request_lines(items, 1, 0))
        with path.open("rb") as stream:
            assert [request.id for request in PromptFile(str(path), stream)] == [item.id for item in items]


@pytest.mark.parametrize("style", ["..", "a/b", "", ".", "a b", "\ud800"])
def test_a_style_leads_nowhere_else(style: str, tmp_path: Path) -> None:
    (tmp_path / "styles.json").write_text(json.dumps({style: ["a fox"]}))
    with pytest.raises(ValueError, match="style|surrogate"):
        BENCHMARKS["hps"].items(tmp_path / "styles.json")


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "evaluation_metadata.jsonl"
    path.write_text("".join(json.dumps({"tag": "x", "prompt": f"a {word}"}) + "\n" for word in ("fox", "guitar", "cactus")))
    return path


@pytest.mark.slow
def test_a_set_is_complete_without_gaps_and_never_before(
    tmp_path: Path, prompts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    command = ["run", "geneval", str(prompts), "--model", "demo", "-o", str(out), "--pictures", "2", *QUICK]
    for part in ("0/2", "1/2"):
        assert cli.evaluate([*command, "--shard", part]) == 0
        assert not (out / "evaluation.json").exists() and not (out / "geneval").exists()
    assert "the same command without --shard lays them out" in capsys.readouterr().out
    assert cli.evaluate(command) == 0
    said = json.loads((out / "evaluation.json").read_text())
    assert said["pictures"] == 6 and said["prompts"] == 3 and said["settings"]["steps"] == 1 and said["fingerprint"]
    assert len(list((out / "geneval").rglob("*.png"))) == 6
    before = {p: p.stat().st_mtime_ns for p in (out / "pictures").glob("*.png")}
    assert cli.evaluate(command) == 0  # nothing is made again
    assert before == {p: p.stat().st_mtime_ns for p in (out / "pictures").glob("*.png")}
    gone = next(iter(before))
    gone.unlink()
    monkeypatched = pytest.MonkeyPatch()
    monkeypatched.setattr("bitdance.cli.generate.run", lambda argv: 0)  # makes nothing and says that all is well
    try:
        assert cli.evaluate(command) == 1
    finally:
        monkeypatched.undo()
    assert f"{gone.name} first; the set is not complete" in capsys.readouterr().err
    assert not (out / "evaluation.json").exists()
    assert cli.evaluate(command) == 0 and gone.exists() and (out / "evaluation.json").exists()


@pytest.mark.slow
def test_a_set_has_one_worker(tmp_path: Path, prompts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Another command for the folder of a set is refused before it touches a file of it."""
    out = tmp_path / "out"
    command = ["run", "geneval", str(prompts), "-o", str(out), "--pictures", "1", "--preset", "fast", "-q"]
    out.mkdir()
    (out / "prompts.jsonl").write_text("of the other")
    with FolderLock(out):
        assert cli.evaluate([*command, "--first-seed", "9"]) == 2
    assert f"{out} is in use by process" in capsys.readouterr().err
    assert [path.name for path in out.iterdir()] == ["prompts.jsonl"] and (out / "prompts.jsonl").read_text() == "of the other"


@pytest.mark.slow
def test_classes_become_a_shuffled_npz_with_a_seed_each(tmp_path: Path) -> None:
    model = tmp_path / "model"
    LAYOUT.save(PictureModel(golden_model(16), golden_tokenizer(), NAMES), model)
    out = tmp_path / "out"
    assert cli.evaluate(["run", "classes", "--model", str(model), "-o", str(out), "--pictures", "2", "--steps", "1", "-q"]) == 0
    with np.load(out / "pictures" / NAME) as file:
        labels = file["arr_1"]
        assert len(file["arr_0"]) == len(labels) and sorted(np.bincount(labels)) == [2] * len(set(labels.tolist()))
        assert labels.tolist() != sorted(labels.tolist())
    rows = [json.loads(line) for line in (out / "pictures" / "manifest.jsonl").read_text().splitlines()]
    assert len({row["seed"] for row in rows}) == len(rows)
    pictures = Pictures.of(str(out))
    assert len(pictures) == len(rows) and pictures.model


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["run", "geneval", "-o", "x"], "give your copy of the benchmark"),
        (["run", "classes", "prompts.jsonl", "-o", "x"], "classes are those of the model"),
        (["run", "classes", "-o", "x", "--random", "3", "--pictures", "2"], "give one of them"),
        (["run", "hps", "x", "-o", "x", "--random", "3"], "--random is for classes"),
        (["run", "dpg", "nowhere", "-o", "x"], "no folder"),
        (["run", "geneval", ".", "-o", "x"], ". is a folder; give a file"),
        (["run", "geneval", "x", "-o", "x", "--seed", "3"], "--first-seed"),
        (["run", "classes", "-o", "x", "--random", "3", "--see", "3"], "--first-seed"),
        (["run", "classes", "-o", "x", "--first-seed", "1_0"], "'1_0'; a whole number"),
        (["score", "."], "nothing to look with"),
        (["score", ".", "--lite0"], "give --reference"),
        (["score", "nowhere.png", "--pairs", "x"], "does not exist"),
    ],
)
def test_bad_use_is_one_line(command: list[str], said: str, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.evaluate(command) == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


# figures


class _Means(nn.Module):
    def forward(self, levels: torch.Tensor) -> torch.Tensor:
        return torch.cat([levels.float().mean(dim=(2, 3)), levels.float().std(dim=(2, 3))], dim=1) / 64


def folder_of(path: Path, count: int, seed: int) -> Path:
    path.mkdir()
    random = np.random.default_rng(seed)
    for k in range(count):
        base = random.integers(0, 255, 3)
        noise = random.integers(0, 40, (12, 12, 3))
        Image.fromarray(np.clip(base + noise, 0, 255).astype(np.uint8)).save(path / f"{k:03d}.png")
    return path


def test_every_figure_says_what_it_stands_or_falls_with(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    means = _Means()
    monkeypatch.setattr(score, "lite0", lambda: Looker("means", lambda levels: Seen(means(levels))))
    ours, real = folder_of(tmp_path / "ours", 20, 0), folder_of(tmp_path / "real", 30, 1)
    out = tmp_path / "figures.json"
    command = ["score", str(ours), "--lite0", "--reference", str(real), "--model", "abc", "-o", str(out)]
    assert cli.evaluate(command) == 0
    printed = capsys.readouterr().out
    figures = {one.name: one for one in read_figures(out)}
    assert set(figures) == {"Lite0 distance", "precision", "recall"}
    one = figures["Lite0 distance"]
    seen = [torch.cat([means(batch) for batch in Pictures.of(str(place)).batches()]) for place in (ours, real)]
    assert one.value == pytest.approx(frechet(*map(Gaussian.of, seen)), rel=1e-9)
    assert figures["precision"].value == precision_recall(seen[1], seen[0])[0]
    assert (one.count, one.model, one.reference, one.features) == (20, "abc", str(real), "means")
    assert one.command.startswith("bitdance evaluate score") and re.fullmatch(r"\d{4}-\d\d-\d\d", one.date)
    assert all(name in printed for name in figures) and "FID" not in printed


def test_npz_and_folder_hold_the_same_pictures(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "a", 5, 0)
    levels = np.stack([np.asarray(Image.open(p)) for p in sorted(folder.iterdir())])
    np.savez(tmp_path / "a.npz", arr_0=levels)
    both = [torch.cat(list(Pictures.of(str(place)).batches())) for place in (folder, tmp_path / "a.npz")]
    assert torch.equal(*both) and both[0].dtype == torch.uint8
    np.savez(tmp_path / "b.npz", arr_0=levels.astype(np.float32))
    with pytest.raises(ValueError, match=r"arr_0 is float32"):
        Pictures.of(str(tmp_path / "b.npz"))
    np.savez(tmp_path / "c.npz", mu=np.zeros(3))
    (tmp_path / "d.npz").write_bytes(b"no archive")
    for name in ("c", "d"):
        with pytest.raises(ValueError, match="no npz with pictures"):
            Pictures.of(str(tmp_path / f"{name}.npz"))


@pytest.mark.parametrize("said", ["[]", '{"fingerprint": 3, "settings": {}}', '{"fingerprint": "f"}'])
def test_what_says_that_a_set_is_complete_is_checked(said: str, tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    folder_of(tmp_path / "set" / "pictures", 2, 0)
    (tmp_path / "set" / "evaluation.json").write_text(said)
    with pytest.raises(ValueError, match="evaluation.json holds"):
        Pictures.of(str(tmp_path / "set"))


def test_what_is_no_picture_is_named(tmp_path: Path) -> None:
    folder_of(tmp_path / "a", 2, 0)
    (tmp_path / "a" / "z.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="z.png is not a readable picture"):
        list(Pictures.of(str(tmp_path / "a")).batches())
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("arr_0.npy", "no array")
    with pytest.raises(ValueError, match="a.npz: arr_0 is no array"):
        Pictures.of(str(tmp_path / "a.npz"))
    np.savez(tmp_path / "b.npz", arr_0=np.zeros((0, 4, 4, 3), np.uint8))
    with pytest.raises(ValueError, match="b.npz: arr_0 is uint8 of shape"):
        Pictures.of(str(tmp_path / "b.npz"))


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut short", b"\x93NUMPY\x01\x00"])
def test_a_reference_that_is_no_npz_is_named(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "r.npz").write_bytes(content)
    with pytest.raises(ValueError, match="r.npz is no npz"):
        score._reference(str(tmp_path / "r.npz"), SimpleNamespace(name="x"))  # type: ignore[arg-type]


def test_prompts_of_a_manifest_keep_their_letters(tmp_path: Path) -> None:
    folder_of(tmp_path / "a", 1, 0)
    line = json.dumps({"file": "a.png", "prompt": "a\u2028b\u0085c"}, ensure_ascii=False).encode()
    (tmp_path / "a" / "manifest.jsonl").write_bytes(line + b'\n\xff torn\n{"file": 3}')
    assert Pictures.of(str(tmp_path / "a")).prompts == {"a.png": "a\u2028b\u0085c"}


def test_figures_that_cannot_be_written_are_shown(tmp_path: Path, capsys: Any) -> None:
    folder_of(tmp_path / "a", 2, 0)
    samples = str(tmp_path / "a")
    assert cli.evaluate(["score", samples, "--pairs", samples, "-o", str(tmp_path / "no" / "f.json")]) == 2
    said = capsys.readouterr()
    assert "| PSNR |" in said.out and "f.json" in said.err


def test_the_statistics_of_an_npz_are_used_for_inception_alone(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    network = _Inception()
    monkeypatch.setattr(score, "inception", lambda weights: looker_of(network))
    ours, real = folder_of(tmp_path / "ours", 20, 0), folder_of(tmp_path / "real", 30, 1)
    for place in (ours, real):
        for file in place.iterdir():
            Image.open(file).resize((17, 17)).save(file)
    looker = looker_of(network)
    seen = looker.all(Pictures.of(str(real)), "real")
    pool, spatial = Gaussian.of(seen.pool_NF), Gaussian.of(seen.spatial_NF)  # type: ignore[arg-type]
    levels = np.stack([np.asarray(Image.open(p)) for p in sorted(real.iterdir())])
    said = {"mu": pool.mean, "sigma": pool.covariance, "mu_s": spatial.mean, "sigma_s": spatial.covariance}
    np.savez(tmp_path / "reference.npz", arr_0=levels, **said)
    out = tmp_path / "f.json"
    weights = ["--inception", "w.pth", "--part", "10"]
    assert cli.evaluate(["score", str(ours), *weights, "--reference", str(tmp_path / "reference.npz"), "-o", str(out)]) == 0
    figures = {one.name: one.value for one in read_figures(out)}
    mine = looker.all(Pictures.of(str(ours)), "ours")
    assert figures["FID"] == pytest.approx(frechet(Gaussian.of(mine.pool_NF), pool), rel=1e-6)
    assert figures["sFID"] == pytest.approx(frechet(Gaussian.of(mine.spatial_NF), spatial), rel=1e-6)  # type: ignore[arg-type]
    assert set(figures) == {"IS", "FID", "sFID", "precision", "recall"}


def test_pairs_give_psnr_and_need_equal_numbers(tmp_path: Path, capsys: Any) -> None:
    one, other = folder_of(tmp_path / "a", 4, 0), folder_of(tmp_path / "b", 4, 0)
    for file in other.iterdir():
        Image.fromarray(np.asarray(Image.open(file)) ^ 1).save(file)
    assert cli.evaluate(["score", str(one), "--pairs", str(other), "--json"]) == 0
    figures = {row["name"]: row["value"] for row in json.loads(capsys.readouterr().out)["figures"]}
    assert figures["PSNR"] == pytest.approx(20 * np.log10(255), abs=1e-4) and figures["SSIM"] > 0.9
    next(iter(other.iterdir())).unlink()
    assert cli.evaluate(["score", str(one), "--pairs", str(other)]) == 2
    assert "pairs are needed" in capsys.readouterr().err


def figure(name: str, value: float, **more: Any) -> Figure:
    said = {
        "spread": None,
        "evaluator": "e",
        "features": "f",
        "reference": "r",
        "count": 10,
        "order": "as they are",
        "seed": None,
    }
    said |= {"samples": "s", "model": "m", "settings": {}, "command": "bitdance evaluate score s", "date": "2026-11-26", **more}
    return Figure(name=name, value=value, **said)


def test_only_what_was_measured_alike_stands_in_one_row(tmp_path: Path, capsys: Any) -> None:
    write_figures([figure("FID", 3.0), figure("IS", 200.0)], tmp_path / "a.json")
    write_figures([figure("FID", 4.0), figure("IS", 210.0, count=20)], tmp_path / "b.json")
    rows = side_by_side({name: read_figures(tmp_path / f"{name}.json") for name in ("a", "b")})
    assert [(row["figure"], row["count"], row["values"]) for row in rows] == [
        ("FID", 10, {"a": 3.0, "b": 4.0}),
        ("IS", 10, {"a": 200.0, "b": None}),
        ("IS", 20, {"a": None, "b": 210.0}),
    ]
    plot = tmp_path / "plot.png"
    assert cli.evaluate(["compare", str(tmp_path / "a.json"), str(tmp_path / "b.json"), "--plot", str(plot)]) == 0
    assert "| FID | f | r | 10 | 3.0000 | 4.0000 |" in capsys.readouterr().out and plot.stat().st_size > 1000
    (tmp_path / "c.json").write_text('{"figures": [{"name": "FID"}]}')
    assert cli.evaluate(["compare", str(tmp_path / "c.json")]) == 2
    assert "is expected" in capsys.readouterr().err


ODD_FIGURES = {
    "count": ("x", True, 1.5, 10**30),
    "value": (True, "3", [1]),
    "name": (["a"], None),
    "evaluator": ({"a": 1},),
    "spread": ("x",),
    "seed": (0.5,),
    "command": (["x"],),
    "settings": ([1], None),
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in ODD_FIGURES.items() for value in values])
def test_a_figure_of_another_type_is_named(name: str, value: Any, tmp_path: Path, capsys: Any) -> None:
    """At both doors: `evaluate compare` and `card`."""
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"figures": [vars(figure("FID", 3.0)) | {name: value}]}))
    for command, words in ((cli.evaluate, ["compare"]), (cli.card, [str(tmp_path)])):
        assert command([*words, str(path)]) == 2
        told = capsys.readouterr().err
        assert f"{path}: {name} = " in told and "`bitdance evaluate score` wrote" in told and told.count("\n") == 1
    assert not (tmp_path / "README.md").exists()


@pytest.mark.parametrize("text", [b"\xff\xfe card", b"---\nlicense: [\n---\n# A model\n", b"---\n- a\n---\n# A model\n"])
def test_a_card_that_cannot_be_read_is_named_and_stays(text: bytes, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "README.md").write_bytes(text)
    write_figures([figure("FID", 3.25)], tmp_path / "a.json")
    assert cli.card([str(tmp_path), str(tmp_path / "a.json")]) == 2
    told = capsys.readouterr().err
    assert f"{tmp_path / 'README.md'}: " in told and told.count("\n") == 1 and (tmp_path / "README.md").read_bytes() == text


def test_a_name_in_a_table_breaks_no_line_of_it(tmp_path: Path) -> None:
    write_figures([figure("FID | x\n# Title\x1b[31m", 3.25)], tmp_path / "a.json")
    assert cli.card([str(tmp_path), str(tmp_path / "a.json")]) == 0
    text = (tmp_path / "README.md").read_text()
    assert "| FID \\| x\\x0a# Title\\x1b[31m |" in text and "\x1b" not in text.partition("## Evaluation")[2]


def test_the_card_takes_figures_and_keeps_the_rest(tmp_path: Path, capsys: Any) -> None:
    from huggingface_hub import ModelCard

    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n# A model\n\nWords.\n\n## Limits\n\nMany.\n")
    write_figures([figure("FID", 3.25)], tmp_path / "a.json")
    for _ in range(2):  # once more changes nothing
        assert cli.card([str(tmp_path), str(tmp_path / "a.json")]) == 0
    card = ModelCard.load(tmp_path / "README.md")
    (result,) = card.data.eval_results
    assert result.metric_value == 3.25 and result.metric_type == "fid" and card.data.license == "mit"
    assert card.text.count("## Evaluation") == 1 and "Many." in card.text and "bitdance evaluate score s" in card.text


@pytest.mark.slow
def test_a_clip_of_a_folder_scores_pictures_and_their_prompts(tmp_path: Path, prompts: Path, capsys: Any) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, PreTrainedTokenizerFast
    from transformers.models.clip import CLIPTextConfig, CLIPVisionConfig

    words = {word: k for k, word in enumerate(["<pad>", "<s>", "</s>", "a", "fox", "guitar", "cactus", "<unk>"])}
    raw = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>", model_max_length=8
    )
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "projection_dim": 8}
    text = CLIPTextConfig(vocab_size=8, max_position_embeddings=8, eos_token_id=2, bos_token_id=1, pad_token_id=0, **small)
    vision = CLIPVisionConfig(image_size=16, patch_size=8, **small)
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=8)).save_pretrained(
        tmp_path / "clip"
    )
    processor = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    CLIPProcessor(image_processor=processor, tokenizer=tokenizer).save_pretrained(tmp_path / "clip")
    out = tmp_path / "out"
    assert cli.evaluate(["run", "geneval", str(prompts), "-o", str(out), "--pictures", "1", *QUICK]) == 0
    capsys.readouterr()
    assert cli.evaluate(["score", str(out), "--clip", str(tmp_path / "clip"), "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["figures"]
    files = sorted((out / "pictures").glob("0*.png"))
    opened = [Image.open(file).convert("RGB") for file in files]
    alone = [
        features.clip_scores(tmp_path / "clip", [one], [text])[0] for one, text in zip(opened, ("a fox", "a guitar", "a cactus"))
    ]
    assert found["value"] == pytest.approx(np.mean(alone), abs=1e-3) and found["count"] == 3 and found["model"]
    (out / "pictures" / "manifest.jsonl").unlink()
    assert cli.evaluate(["score", str(out), "--clip", str(tmp_path / "clip")]) == 2
    assert "prompts of 3 of 3 pictures are not known" in capsys.readouterr().err
