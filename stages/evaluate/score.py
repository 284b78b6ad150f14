"""`bitdance evaluate score`: pictures against a reference → figures, each with all that it stands or falls with.

    bitdance evaluate score out/samples.npz --reference VIRTUAL_imagenet256.npz --inception weights-inception-….pth
    bitdance evaluate score out --reference shards/test --lite0 -o figures.json
    bitdance evaluate score out --clip clip-vit-large-patch14
    bitdance evaluate score reconstructions --pairs originals

Whose numbers: Fréchet distances, inception score, precision and recall are the formulas of ADM's evaluator, on features of
torch-fidelity's port of its network; ADM's own runs TensorFlow. EfficientNet-Lite0's are their own, and no FID.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from bitdance.cli import Parser, count, print_page
from lfq_tokenizer.json_file import json_text
from lfq_tokenizer.text import printable
from stages.evaluate.features import Looker, Seen, clip_scores, inception, lite0
from stages.evaluate.figure import Figure, table, write_figures
from stages.evaluate.samples import Pictures, opened
from stages.evaluate.scores import NEIGHBOUR, PART, Gaussian, frechet, inception_score, precision_recall
from stages.measure.reconstruction import Reconstruction
from stages.recipes.tokenizer.perceptual import LPIPS

STATISTICS = {"pool_NF": ("mu", "sigma"), "spatial_NF": ("mu_s", "sigma_s")}


def main(argv: Sequence[str]) -> int:
    """The figures as a table or as JSON, and as a file with -o."""
    arguments = _parser().parse_args(list(argv))
    if not (arguments.clip or arguments.pairs or arguments.inception or arguments.lite0):
        raise ValueError("nothing to look with; give --inception FILE, --lite0, --clip FOLDER, or --pairs ORIGINALS")
    if arguments.lite0 and not arguments.inception and not arguments.reference:
        raise ValueError("--lite0 compares; give --reference")
    pictures = Pictures.of(arguments.samples)
    found = _Scores(arguments, pictures, "bitdance evaluate score " + shlex.join(argv)).figures()
    if arguments.json:
        print(json_text({"figures": [vars(one) for one in found]}))
    else:
        print_page(table(found).splitlines())
    if arguments.output is not None:  # last: what was found is shown, also where it cannot be written
        write_figures(found, arguments.output)
    return 0


def _parser() -> Parser:
    parser = Parser(prog="bitdance evaluate score", description="Scores of pictures, with what they stand or fall with.")
    parser.add_argument("samples", help="an npz (arr_0), a folder of pictures or of `evaluate run`, or shards")
    parser.add_argument("--reference", metavar="PLACE", help="an npz with mu and sigma or with pictures, a folder, or shards")
    parser.add_argument("--inception", type=Path, metavar="FILE", help="weights-inception-2015-12-05-6726825d.pth")
    parser.add_argument("--lite0", action="store_true", help="EfficientNet-Lite0 of the extra frechet")
    parser.add_argument("--clip", type=Path, metavar="FOLDER", help="CLIP score: a folder as transformers keeps it")
    parser.add_argument("--pairs", metavar="ORIGINALS", help="PSNR, SSIM and (--lpips) LPIPS against pictures in the same order")
    parser.add_argument("--lpips", type=Path, metavar="FILE", help="weights that `bitdance tokenizer lpips` wrote")
    parser.add_argument("--part", type=count, default=PART, help=f"pictures of a part of the inception score (default: {PART})")
    parser.add_argument("--seed", type=int, default=0, help="of the order in which parts are taken (default: 0)")
    parser.add_argument("--model", default="", help="fingerprint of the model, where the samples do not say it")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE.json", help="write the figures to a file, too")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")
    return parser


class _Scores:
    def __init__(self, arguments: argparse.Namespace, pictures: Pictures, command: str) -> None:
        self.arguments, self.pictures, self.command = arguments, pictures, command

    def figures(self) -> list[Figure]:
        arguments, found = self.arguments, list[Figure]()
        if arguments.inception:
            found += self._looked(inception(arguments.inception))
        if arguments.lite0:
            found += self._looked(lite0())
        if arguments.clip:
            found.append(self._clip(arguments.clip))
        if arguments.pairs:
            found += self._pairs(arguments.pairs)
        return found

    def _figure(
        self, name: str, value: float, evaluator: str, features: str, reference: str, order: str = "as they are", **more: Any
    ) -> Figure:
        fixed = {"count": len(self.pictures), "spread": None, "seed": None, **more}
        return Figure(
            name=name, value=value, evaluator=evaluator, features=features, reference=reference, order=order,
            samples=self.pictures.place, model=self.pictures.model or self.arguments.model, settings=self.pictures.settings,
            command=self.command, date=date.today().isoformat(), **fixed,
        )  # fmt: skip

    def _looked(self, looker: Looker) -> list[Figure]:
        arguments, seen, found = self.arguments, looker.all(self.pictures, "samples"), list[Figure]()
        formulas = "ADM's formulas"
        if seen.logits_NC is not None:
            score, spread = inception_score(seen.logits_NC, arguments.part, arguments.seed)
            said = f"{formulas}, parts of {arguments.part}"
            found.append(self._figure("IS", score, said, looker.name, "none", "shuffled", spread=spread, seed=arguments.seed))
        if arguments.reference is None:
            return found
        statistics, there = _reference(arguments.reference, looker)
        names = {"pool_NF": "FID", "spatial_NF": "sFID"} if seen.logits_NC is not None else {"pool_NF": "Lite0 distance"}
        for part, name in names.items():
            if part in statistics and (features := getattr(seen, part)) is not None:
                value = frechet(Gaussian.of(features), statistics[part])
                found.append(self._figure(name, value, formulas, looker.name, arguments.reference))
        if there is not None:
            precision, recall = precision_recall(there.pool_NF, seen.pool_NF)
            said = f"{formulas}, k = {NEIGHBOUR}, {len(there.pool_NF):,} reference pictures"
            found.append(self._figure("precision", precision, said, looker.name, arguments.reference))
            found.append(self._figure("recall", recall, said, looker.name, arguments.reference))
        return found

    def _clip(self, folder: Path) -> Figure:
        named = self.pictures.prompts
        pairs = [(file, named[file.name]) for file in self.pictures.files if file.name in named]
        if not pairs or len(pairs) < len(self.pictures):
            raise ValueError(
                f"{self.pictures.place}: the prompts of {len(self.pictures) - len(pairs)} of {len(self.pictures)} pictures are "
                "not known; a CLIP score needs a folder that `bitdance generate` or `evaluate run` wrote"
            )
        scores = clip_scores(folder, (opened(file) for file, _ in pairs), [prompt for _, prompt in pairs])
        return self._figure(
            "CLIP score", float(np.mean(scores)), "max(0, 100·cosine)", folder.name, "prompts", spread=float(np.std(scores))
        )

    def _pairs(self, place: str) -> list[Figure]:
        originals = Pictures.of(place)
        if len(originals) != len(self.pictures):
            raise ValueError(
                f"{self.pictures.place} holds {len(self.pictures)} pictures, {place} {len(originals)}; pairs are needed"
            )
        perceptual = LPIPS.from_file(self.arguments.lpips) if self.arguments.lpips else None
        measured = Reconstruction(0, perceptual)
        for ours, theirs in zip(self.pictures.batches(), originals.batches(), strict=True):
            measured.add(theirs.float() / 127.5 - 1, ours.float() / 127.5 - 1)
        for note in measured.notes():
            print(f"note: {printable(note)}", file=sys.stderr)
        nets = {"psnr": "levels 0…255", "ssim": "Gaussian of 11 taps", "lpips": f"LPIPS, {perceptual.net if perceptual else ''}"}
        return [
            self._figure(name.upper(), value, "Reconstruction", nets[name], place, "pairs by name")
            for name, value in measured.result().items()
            if name in nets
        ]


def _reference(place: str, looker: Looker) -> tuple[dict[str, Gaussian], Seen | None]:
    """Statistics of each sort of features, and the features of the reference's pictures where it has any."""
    statistics: dict[str, Gaussian] = {}
    if place.endswith(".npz"):
        try:
            with np.load(place, allow_pickle=False) as file:
                names = set(file.files)
                for part, (mean, covariance) in STATISTICS.items():
                    if {mean, covariance} <= names and looker.name.startswith("Inception"):
                        statistics[part] = Gaussian(file[mean].astype(np.float64), file[covariance].astype(np.float64))
        except (BadZipFile, EOFError, ValueError, TypeError, AttributeError) as error:  # numpy's own, which name no file
            raise ValueError(f"{place} is no npz that can be read ({error}); fetch it again") from None
        if "arr_0" not in names and not statistics:
            raise ValueError(
                f"{place} holds {', '.join(sorted(names))}; mu and sigma of Inception, or pictures as arr_0, are needed"
            )
        if "arr_0" not in names:
            return statistics, None
    there = looker.all(Pictures.of(place), "reference")
    for part in STATISTICS:
        if part not in statistics and (features := getattr(there, part)) is not None:
            statistics[part] = Gaussian.of(features)
    return statistics, there
