"""Table and plots of the comparison that `compare_train.py` trains."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from lfq_tokenizer.files import whole_path, write_text
from lfq_tokenizer.json_file import read_json, write_json
from stages.measure.compare_train import load_one, load_pictures
from stages.measure.reconstruction import Reconstruction
from stages.recipes.tokenizer.perceptual import LPIPS

TITLES = {
    "lfq": "LFQ in groups (ours)",
    "hbq": "HBQ, four bits per latent (ours)",
    "multi_scale": "bits at every scale (ours)",
    "bsq": "BSQ",
    "fsq": "FSQ",
    "vq": "VQ",
    "rvq": "residual VQ",
    "continuous": "continuous, equal bits (bfloat16 channels)",
    "continuous-width": "continuous, equal channels (16 × the bits)",
}
DISCRETE = ("lfq", "hbq", "multi_scale", "bsq", "fsq", "vq", "rvq")
KINDS = ("photographs", "icons")


@torch.no_grad()
def measure_run(path: Path, groups: Mapping[str, Tensor], perceptual: LPIPS | None) -> dict[str, Any]:
    """Figures of one trained autoencoder per group of pictures (K,3,H,W) uint8; or its `.figures.json` if newer."""
    cache = path.with_suffix(".figures.json")
    if cache.exists() and cache.stat().st_mtime > path.stat().st_mtime:
        return read_json(cache)
    model, facts = load_one(path)
    found: dict[str, Any] = {key: facts[key] for key in ("name", "bits", "cpu_seconds")} | {"label": path.stem}
    for kind, pictures in groups.items():
        figures = Reconstruction(0, perceptual)
        for part in pictures.split(32):
            images = part.float() / 127.5 - 1
            figures.add(images, model(images)[0])
        found[kind] = figures.result()
    write_json(found, cache)
    return found


def report(folder: Path, heldout: Sequence[Sequence[str]], lpips: str | None, out: Path) -> list[dict[str, Any]]:
    """Write `comparison.json`, `comparison.md`, `comparison.png` and `scaling.png` into `out` for all runs in `folder`."""
    paths = sorted(p for p in folder.glob("*.json") if not p.name.endswith(".figures.json"))
    if not paths:
        raise FileNotFoundError(f"{folder} holds no trained run; start with: python -m stages.measure.compare train {folder} …")
    settings = [read_json(p)["setting"] for p in paths]
    if any(s != settings[0] for s in settings):
        raise ValueError(f"the runs in {folder} were trained with different settings; compare within one setting only")
    groups = dict(zip(KINDS, load_pictures(heldout), strict=True))
    perceptual = LPIPS.from_file(lpips) if lpips else None
    rows = [measure_run(p, groups, perceptual) for p in tqdm(paths, disable=None, unit="run")]
    for row in rows:
        for name in ("psnr", "ssim", "lpips"):
            if name in row[KINDS[0]]:
                row[name] = sum(row[kind][name] for kind in KINDS) / len(KINDS)
    rows.sort(key=lambda row: (row["bits"], list(TITLES).index(row["name"])))
    out.mkdir(parents=True, exist_ok=True)
    pictures = {kind: len(group) for kind, group in groups.items()}
    write_json({"setting": settings[0], "pictures": pictures, "runs": rows}, out / "comparison.json")
    write_text(table(rows) + "\n", out / "comparison.md")
    plot_comparison(rows, out / "comparison.png")
    plot_scaling(rows, out / "scaling.png")
    return rows


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: one line per run, the best discrete figure of each rate in bold."""
    lines = ["| bits per token | bottleneck | PSNR | SSIM | LPIPS | PSNR photographs | PSNR icons |", "|---" * 7 + "|"]
    for row in rows:
        rivals = [r for r in rows if r["bits"] == row["bits"] and r["name"] in DISCRETE]
        contest = rivals if row["name"] in DISCRETE and len(rivals) > 1 else []
        figures = [_figure(row, contest, *column) for column in (("psnr", 2, max), ("ssim", 3, max), ("lpips", 3, min))]
        figures += [f"{row[kind]['psnr']:.2f}" for kind in KINDS]
        lines.append(f"| {row['bits']:g} | {TITLES[row['name']]} | " + " | ".join(figures) + " |")
    return "\n".join(lines)


def _figure(row: Mapping[str, Any], contest: Sequence[Mapping[str, Any]], name: str, digits: int, best: Any) -> str:
    """A cell of the table, bold where it is the best of the contest."""
    if name not in row:
        return "—"
    text = f"{row[name]:.{digits}f}"
    return f"**{text}**" if contest and row[name] == best(r[name] for r in contest) else text


def plot_comparison(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """PSNR and LPIPS over bits per token, one line per bottleneck."""
    measures = [name for name in ("psnr", "lpips") if any(name in row for row in rows)]
    figure, axes = _axes(len(measures))
    for axis, name in zip(axes, measures):
        for kind, title in TITLES.items():
            points = [(row["bits"], row[name]) for row in rows if row["name"] == kind and name in row]
            if points:
                style = {"marker": "o", "linewidth": 2.5 if kind == "lfq" else 1.2, "linestyle": "-" if kind in DISCRETE else ":"}
                axis.plot(*zip(*points), label=title, **style)
        _label(axis, name)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    with whole_path(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")


def plot_scaling(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """PSNR, SSIM and LPIPS of lookup-free bits over bits per token, at one and the same compute."""
    measures = [name for name in ("psnr", "ssim", "lpips") if any(name in row for row in rows)]
    figure, axes = _axes(len(measures))
    ours = [row for row in rows if row["name"] == "lfq"]
    for axis, name in zip(axes, measures):
        for kind in KINDS:
            axis.plot([row["bits"] for row in ours], [row[kind][name] for row in ours], marker="o", label=kind)
        _label(axis, name)
    axes[0].legend(fontsize=8)
    with whole_path(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")


def _axes(count: int) -> tuple[Any, list[Any]]:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("the plots need matplotlib: pip install -e '.[compare]'") from error
    figure = Figure(figsize=(4.6 * count, 3.8), layout="constrained")
    axes = figure.subplots(1, count, squeeze=False)[0]
    return figure, list(axes)


def _label(axis: Any, name: str) -> None:
    axis.set_xscale("log", base=2)
    ticks = [2**n for n in range(3, 11) if axis.get_xlim()[0] <= 2**n <= axis.get_xlim()[1]]
    axis.set_xticks(ticks, [str(tick) for tick in ticks])
    axis.set_xlabel("bits per token")
    axis.set_ylabel({"psnr": "PSNR, dB", "ssim": "SSIM", "lpips": "LPIPS (AlexNet), lower is better"}[name])
    axis.grid(alpha=0.3)
