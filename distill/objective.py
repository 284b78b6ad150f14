"""The loss of distillation: data, teacher, samples, each with its weight.

The student predicts a patch of kp × kp tokens at once, the teacher the k × k sub-patches of which it is made, one after the
other. For one sub-patch s of a patch, with x its true bits and x_t = t·x + (1 − t)·ε, write

    S   what the student sees: the prompt, all patches before this one, and x_t of the whole patch
    T_s what the teacher sees: the prompt, all sub-patches before s in its own raster order, and x_t of s

Both predict x; the loss is on velocity, v̂ = (x̂ − x_t) / max(1 − t, 0.05), so errors of x̂ count 1/(1 − t)².

**data**: E|v̂ − v|² over real pictures. Its minimiser is x̂ = E[x | S], which is what sampling needs. The target x is a single
draw, so its variance Var(x | S) goes into every gradient.

**teacher**: E|v̂ − v̂_T|², v̂_T from m_s = E[x | T_s]. Its minimiser is E[m_s | S]. If T_s held all of S, the tower property
would make that E[x | S], the same minimiser as `data`, and the variance of the target would fall from Var(x | S) to Var(m_s |
S). The teacher does know more in one respect: it sees the earlier sub-patches of the patch as they are, where the student sees
them in noise. But it does not hold all of S. It misses
    (a) x_t of the sub-patches after s in the same patch;
    (b) for sub-patches that are not in the last row of the patch: the lower rows of the patches to the left, which come
        later in the teacher's raster. Pictures of one patch a row have none.
So the minimiser is off by the gap E[x | S] − E[m_s | S] = E[ E[x | S, T_s] − E[x | T_s] | S ], of a mean square of at most
2·I(x; missing | T_s) per bit in ±1 (Jensen, then Pinsker). Of (a) there is
    at t → 0 nothing to miss: x_t of the others is noise;
    at t → 1 nothing to learn: x_t of s alone gives x away;
    in between up to what one half of a picture tells about the other half;
    never anything for the last sub-patch, which has all others before it.
So the teacher helps where noise is high and for late sub-patches, and misleads in the middle and for early ones. Hence the weight

    w(t, s) = (1 − t)^(fade · share of the patch's sub-patches that come after s)

which is 1 for the last sub-patch at any time and for all at t = 0. What gap is left ((b), and the mistakes of the teacher itself)
goes with the weight: it falls linearly to nothing at step `fade_steps`, so that the run ends as `data` or `samples` alone.

A dropped prompt is dropped for both. Cached predictions keep the prompt in T_s where the student's is dropped: a teacher that
knows more, for which the tower property holds.

**samples**: E|v̂ − v|² over pictures that the teacher made of the training captions. Its minimiser is E_teacher[x | S]: the
student learns the teacher's distribution, not that of the data, with no gap of the kind above, since the pictures are whole draws
of the teacher's own autoregressive chain. If they were made with guidance g, that distribution is the guided one, and the
student's conditional branch alone, without guidance, samples from it: half the work per step. The `teacher` term then takes
guided predictions, x̂_u + g·(x̂_c − x̂_u), which are the velocities that the guided sampler follows.

Source: the paper trains larger patches on data alone (BitDance, arXiv 2602.14041, distillation); the other two are ours.
"""

import torch
from torch import Tensor

from bitdance.heads.diffusion.flow import velocity_from_x
from bitdance.model import BitDanceModel, TrainingLosses
from bitdance.sequence.patches import patch_side
from distill.config import DistillTraining
from distill.documents import DistillBatch
from distill.teacher import Teacher
from stages.config import GeneratorTraining
from stages.recipes.frozen import Frozen
from stages.recipes.generator.documents import GeneratorBatch
from stages.recipes.generator.objective import GeneratorObjective, by_noise_level


class DistillObjective(GeneratorObjective):
    """`teacher` is None where its term is left out or its predictions come with the data."""

    def __init__(
        self,
        model: BitDanceModel,
        training: GeneratorTraining,
        distill: DistillTraining,
        teacher_block: int,  # tokens per step of the teacher
        teacher: Teacher | None,
    ) -> None:
        super().__init__(model, training)
        self.distill, self.teacher_block = distill, teacher_block
        self.teacher = Frozen(teacher)

    def vision(self, losses: TrainingLosses, batch: GeneratorBatch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """bits_weight · loss against true bits + teacher_weight · w(t, s) · loss against the teacher's prediction."""
        weights = self.distill.objectives
        learned = (weights.data + weights.samples) * losses.vision
        strength = weights.teacher * fading(step, self.distill.fade_steps)
        if not strength:
            return learned, {}
        target_RPC = self.target(batch)
        t_R11 = losses.time_rows[:, None, None]
        pull_RP = squared_velocity(losses.predicted_rows, target_RPC, t_R11)
        after_P = sub_patches_after(self.model.patch_side, patch_side(self.teacher_block), pull_RP.device)
        weight_RP = (1 - losses.time_rows[:, None]) ** (self.distill.fade * after_P)
        learned = learned + strength * (weight_RP * pull_RP).mean()
        # how the teacher itself does: where the student's loss is lower, the teacher has nothing left to say
        bits_MPC = batch.sequence.image_bits_NC.unflatten(0, (-1, self.model.block_size))
        teachers_RP = squared_velocity(target_RPC, bits_MPC.repeat(len(target_RPC) // len(bits_MPC), 1, 1), t_R11)
        scalars = {"pull": pull_RP.mean().detach(), "teacher": teachers_RP.mean()}
        return learned, scalars | by_noise_level("teacher", teachers_RP, losses.time_rows)

    def target(self, batch: GeneratorBatch) -> Tensor:
        """(rows, P, C) what the teacher predicts at the student's times and noise."""
        assert isinstance(batch, DistillBatch)
        if batch.targets_SMPC is not None:
            return batch.targets_SMPC.float().flatten(0, 1)
        teacher = self.teacher.module
        assert isinstance(teacher, Teacher)
        return teacher.predict(batch.views, batch.sequence, self._attention(batch.sequence.ids_BL))


def squared_velocity(x_hat: Tensor, x: Tensor, t: Tensor) -> Tensor:
    """Mean over the bits of |v̂ − v|²: the noisy point, which both velocities start from, cancels."""
    nothing = torch.zeros_like(x)
    return (velocity_from_x(x_hat, nothing, t) - velocity_from_x(x, nothing, t)).square().mean(-1)


def fading(step: int, fade_steps: int) -> float:
    """The teacher's weight at a step: from 1 to 0 at `fade_steps`, or always 1."""
    return max(0.0, 1 - step / fade_steps) if fade_steps else 1.0


def sub_patches_after(side: int, sub_patch: int, device: torch.device | str | None = None) -> Tensor:
    """(P,) of each token of a patch of `side`, the share of the patch's other sub-patches that come after its own: 1 … 0."""
    k = side // sub_patch
    place = torch.arange(side, device=device) // sub_patch
    number = (place[:, None] * k + place[None, :]).flatten()
    return (k * k - 1 - number) / (k * k - 1)
