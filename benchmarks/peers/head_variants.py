"""The ways of computing the head step that are compared, each from hidden states to one number, and their inputs.

Imported by head_measure.py in this project's environment or in the peers': libraries are imported where they are used.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from importlib.metadata import distribution

import torch
from torch import Tensor

WIDTH, VOCABULARY, KEPT = 576, 49_152, 64  # SmolLM2-135M's head; the recording keeps the top 64
THRESHOLD = 3e-3  # of column sampling
Step = Callable[[Tensor, Tensor, Tensor, Tensor, tuple], Tensor]  # student and teacher: hidden, weight; what is kept


def stillroom(hidden, weight, teacher, **how):
    from stillroom.divergences import forward_kl
    from stillroom.divergences.projection import Arithmetic
    from stillroom.types import Projected

    return forward_kl(Projected(hidden, weight), teacher, arithmetic=Arithmetic(**how)).mean()


def stillroom_dense(hidden, weight, teacher_hidden, teacher_weight, kept, **how):
    from stillroom.types import Projected

    return stillroom(hidden, weight, Projected(teacher_hidden, teacher_weight), **how)


def stillroom_dense_bf16(*arguments):
    return stillroom_dense(*arguments, matmul="bf16")


def stillroom_dense_sampled(*arguments):
    return stillroom_dense(*arguments, keep_columns=THRESHOLD)


def stillroom_sparse(hidden, weight, teacher_hidden, teacher_weight, kept, **how):
    from stillroom.types import Sparse

    return stillroom(hidden, weight, Sparse(*kept, len(weight)), **how)


def stillroom_sparse_bf16(*arguments):
    return stillroom_sparse(*arguments, matmul="bf16")


def stillroom_sparse_sampled(*arguments):
    return stillroom_sparse(*arguments, keep_columns=THRESHOLD)


def stillroom_sparse_sampled_bf16(*arguments):
    return stillroom_sparse(*arguments, matmul="bf16", keep_columns=THRESHOLD)


def distillkit_formula(hidden, weight, teacher_hidden, teacher_weight, kept):
    """What DistillKit computes from kept log-probabilities and a symmetric tail, written anew; by 1,024 positions.

    Kept entries and one bucket for what is missing on both sides, log-sum-exp in float32, all logits at once.
    """
    total, logits, (ids, log_probs, _) = 0.0, hidden @ weight.t(), kept
    for z, some, log_p in zip(*(x.split(1024) for x in (logits, ids, log_probs)), strict=True):
        log_q = z.gather(-1, some) - z.float().logsumexp(-1, keepdim=True).to(z.dtype)
        inside = (log_p.exp() * (log_p - log_q)).sum(-1)
        p_rest, q_rest = (1 - x.float().exp().sum(-1).clamp(1e-8, 1 - 1e-8) for x in (log_p, log_q))
        total = total + (inside + p_rest * (p_rest.log() - q_rest.log())).sum().to(z.dtype)
    return total / len(hidden)


def torchtune_loss(name):
    """A class of torchtune's loss file, loaded alone: its package imports a torchao of another time."""
    path = distribution("torchtune").locate_file("torchtune/modules/loss/kd_losses.py")
    spec = importlib.util.spec_from_file_location("kd_losses", str(path))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name)()


def torchtune_forward_kl(hidden, weight, teacher_hidden, teacher_weight, kept):
    """ForwardKLLoss, which leaves the teacher's entropy out."""
    with torch.no_grad():
        teacher = teacher_hidden @ teacher_weight.t()
    labels = torch.zeros(1, len(hidden), dtype=torch.long)
    return torchtune_loss("ForwardKLLoss")((hidden @ weight.t())[None], teacher[None], labels)


def torchtune_chunked(hidden, weight, teacher_hidden, teacher_weight, kept):
    """ForwardKLWithChunkedOutputLoss at its default of 8 chunks, each with its own matmul, as its models do."""
    with torch.no_grad():
        teacher = [(part @ teacher_weight.t())[None] for part in teacher_hidden.chunk(8)]
    student = [(part @ weight.t())[None] for part in hidden.chunk(8)]
    labels = torch.zeros(1, len(hidden), dtype=torch.long)
    return torchtune_loss("ForwardKLWithChunkedOutputLoss")(student, teacher, labels)


def trl_gkd(hidden, weight, teacher_hidden, teacher_weight, kept, beta=0.0):
    """GKDTrainer's loss; beta 0 is forward KL, 0.5 its default."""
    from trl.experimental.gkd.gkd_trainer import GKDTrainer

    with torch.no_grad():
        teacher = teacher_hidden @ teacher_weight.t()
    labels = torch.zeros(1, len(hidden), dtype=torch.long)
    return GKDTrainer.generalized_jsd_loss((hidden @ weight.t())[None], teacher[None], labels, beta=beta)


def trl_gkd_default(*arguments):
    return trl_gkd(*arguments, beta=0.5)


def trl_tiled(hidden, weight, teacher_hidden, teacher_weight, kept):
    """DistillationTrainer's loss from hidden states, forward KL: tiles of 4,096 positions x 32,768 ids."""
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    mask = torch.ones(1, len(hidden))
    return _chunked_divergence_loss(hidden[None], teacher_hidden[None], weight, teacher_weight, mask, 0.0)[0]


def liger_chunked(hidden, weight, teacher_hidden, teacher_weight, kept):
    """LigerFusedLinearJSDLoss at its defaults (compiled, chunks of 1,024) but for beta 0 and no hard labels."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    labels = torch.zeros(len(hidden), dtype=torch.long)
    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0)
    return loss(hidden, weight, teacher_hidden, teacher_weight, labels)


OURS = (stillroom_dense, stillroom_dense_bf16, stillroom_dense_sampled, stillroom_sparse, stillroom_sparse_bf16)
OURS += (stillroom_sparse_sampled, stillroom_sparse_sampled_bf16)
THEIRS = (trl_gkd, trl_gkd_default, trl_tiled, liger_chunked, torchtune_forward_kl, torchtune_chunked)
VARIANTS = {step.__name__: step for step in (*OURS, distillkit_formula, *THEIRS)}


def is_sparse(step: Step) -> bool:
    return "sparse" in step.__name__ or step is distillkit_formula


def inputs(positions: int, dtype: torch.dtype = torch.float32, vocabulary: int = VOCABULARY) -> tuple:
    """A student, a teacher, and what a recording keeps of it: as uneven as text.

    One feature holds how frequent each id is (a power law), the others are random; the teacher's top 1, 8, 64 and 128
    ids hold about .40, .70, .89 and .93 of its mass (SmolLM2 on text: .53, .78, .90, .93); the student is 0.6 nats off.
    """
    random = torch.Generator().manual_seed(0)
    weight = torch.randn(vocabulary, WIDTH, generator=random) * (4 / math.sqrt(WIDTH - 1))
    weight[:, 0] = -1.2 * (1 + torch.randperm(vocabulary, generator=random)).log()
    teacher_hidden, noise = (torch.randn(positions, WIDTH, generator=random) for _ in range(2))
    hidden = 0.95 * (0.95 * teacher_hidden + 0.31 * noise)
    hidden[:, 0] = teacher_hidden[:, 0] = 1
    ids, log_probs, rest = [], [], []
    for part in teacher_hidden.split(128):
        full = (part @ weight.t()).log_softmax(-1)
        top = full.topk(KEPT)
        ids.append(top.indices), log_probs.append(top.values)
        rest.append(full.scatter(-1, top.indices, float("-inf")).logsumexp(-1))
    kept = torch.cat(ids), torch.cat(log_probs).to(dtype), torch.cat(rest).to(dtype)
    students = [each.to(dtype, copy=True).requires_grad_() for each in (hidden, weight)]
    return (*students, teacher_hidden.to(dtype), weight.to(dtype), kept)
