"""The teacher: a frozen model that predicts the student's noisy patches, sub-patch by sub-patch."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from bitdance.folder.checkpoint import load_model
from bitdance.folder.fingerprint import fingerprint
from bitdance.model import Attention, BitDanceModel
from bitdance.sequence.batch import TrainingBatch
from distill.config import DistillTraining
from distill.view import TeacherView
from lfq_tokenizer.entropy import without_autocast
from stages.engine.checkpoint import model_folder


class Teacher:
    """Its weights, precision and place are its own; the student trains elsewhere and in another precision.

    With `offload` the weights wait in main memory, and each layer's visit `device` for its own pass (accelerate's hooks): the
    device holds one layer at a time and every pass moves all weights once.
    """

    def __init__(
        self, model: BitDanceModel, guidance: float = 1.0, device: torch.device | str | None = None, offload: bool = False
    ) -> None:
        self.model = BitDanceModel(None, model.text_tokenizer, model.projector, model.backbone, model.head)
        self.model.eval().requires_grad_(False)
        self.guidance, self.offload = guidance, offload
        self._device = None if device is None else torch.device(device)
        self._placed: torch.device | None = None

    @classmethod
    def load(cls, distill: DistillTraining) -> "Teacher":
        """The model of `distill.teacher` in its dtype, on the CPU until it is asked. ValueError for a device that is none."""
        device = own_device(distill)
        dtype = distill.torch_dtype(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        model = load_model(model_folder(distill.teacher), device="cpu", dtype=dtype, generation_only=True)
        return cls(model, distill.guidance, device, distill.offload)

    @torch.no_grad()
    def predict(self, views: Sequence[TeacherView], student: TrainingBatch, attention: Attention) -> Tensor:
        """x̂ (rows, P, C) float32, a row for each of the student's, on the student's device. With a second view, one without
        prompts, the prediction is guided.

        At one x_t guided velocity and guided prediction are the same thing, v = (x̂ − x_t) / (1 − t): x̂_u + g·(x̂_c − x̂_u).
        """
        assert student.noise is not None
        home = student.image_bits_NC.device
        device = self._device or home
        self._place(device)
        if device.type != home.type:
            attention = "flex" if device.type == "cuda" else "dense"
        predicted = []
        for view in views:
            # the student's autocast is none of the teacher's business
            with without_autocast(device):
                rows_KTC = self.model(view.seen(student).to(device), attention=attention).predicted_rows
            S, _, P, _ = student.noise.noise_SMPC.shape
            predicted.append(view.as_student(rows_KTC.float().to(home), S, P))
        if len(predicted) == 1:
            return predicted[0]
        prompted, unprompted = predicted
        return unprompted + self.guidance * (prompted - unprompted)

    def _place(self, device: torch.device) -> None:
        if self._placed == device:
            return
        if self.offload:
            try:
                from accelerate import cpu_offload
            except ImportError:
                raise ValueError("distill.offload needs accelerate: pip install accelerate, or set distill.device") from None
            parts: tuple[nn.Module, ...] = (self.model.projector, self.model.backbone, self.model.head)
            for part in parts:
                cpu_offload(part, execution_device=device)
        else:
            self.model.to(device)
        self._placed = device


def own_device(distill: DistillTraining) -> torch.device | None:
    """What `distill.device` names, None where it names nothing. ValueError where it cannot be used here."""
    try:
        device = torch.device(distill.device) if distill.device else None
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"distill.device = {distill.device!r} cannot be used here: {str(error).splitlines()[0]}") from None
    return device


def origin(distill: DistillTraining) -> dict[str, object]:
    """What the student's card says of its teacher: nothing of this machine."""
    folder = model_folder(distill.teacher)
    return {"fingerprint": fingerprint(folder), "guidance": distill.guidance}
