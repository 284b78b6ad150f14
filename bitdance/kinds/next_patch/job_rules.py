"""What `bitdance generate` asks of a text model."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bitdance.checkpoint import check_folder, read_extras
from bitdance.fingerprint import fingerprint
from bitdance.prompt_file import Request
from bitdance.sampling import Sampling, choose
from bitdance.sizes import Size, check_size, default_size, rule_of_folder


class JobRules:
    """A folder that is whole; its weights are not loaded. `unknown`: options of the command that are not for such a model."""

    unknown = ("cfg_schedule",)

    def __init__(self, folder: Path) -> None:
        check_folder(folder)
        self.folder = folder
        self._rule, self._defaults = rule_of_folder(folder), read_extras(folder).get("defaults", {})

    @property
    def default_size(self) -> Size:
        """(height, width) where nothing is said."""
        return default_size(self._rule)

    def check_size(self, height: int, width: int) -> None:
        """ValueError for a size that the model does not make."""
        check_size(self._rule, height, width)

    def sampling(self, said: dict[str, Any], preset: str | None, remade: bool) -> Sampling:
        """What was said, else the preset, else the model's defaults; without their preset where a picture is made again, which
        says what it does not have from the published procedure."""
        defaults = {name: value for name, value in self._defaults.items() if not (remade and name == "preset")}
        said = {name: value for name, value in said.items() if name not in self.unknown}  # of a class's picture, refused as such
        return choose(defaults, preset, **said)

    def requests(self, request: Request) -> Iterator[Request]:
        """The request as it is. ValueError for one of a class."""
        if request.label is not None:
            raise ValueError(f"{request.source}: this model makes pictures of prompts; a class needs a class model (--model)")
        yield request

    def fingerprint(self) -> str:
        """What tells the model from others."""
        return fingerprint(self.folder)

    def load(self, order: Any) -> Any:
        """The pipeline of an order, after a look at the memory."""
        from bitdance.cli.loading import load_text

        return load_text(order)
