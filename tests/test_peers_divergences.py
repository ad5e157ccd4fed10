"""Our values against those of other libraries' own functions, where they are installed.

They run in an environment of their own (benchmarks/requirements-peers.txt), so that none becomes a dependency.
"""

import json
import subprocess
from pathlib import Path

import pytest
import torch

from stillroom import likeness
from stillroom.divergences import forward_kl, jensen_shannon, reverse_kl
from stillroom.types import Projected

ROOT = Path(__file__).parent.parent
PEERS = ROOT / ".venv-peers" / "bin" / "python"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PEERS.exists(), reason="no .venv-peers: see benchmarks/requirements-peers.txt"),
]
WEIGHTS = {"0.0": forward_kl, "1.0": reverse_kl}  # their beta, where it is an end


@pytest.fixture(scope="module")
def numbers():
    """Two little models with heads, in float64 but for what the peers hold in float32."""
    random = torch.Generator().manual_seed(7)

    def draw(*shape):
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    i, j = torch.arange(4, dtype=torch.float64)[:, None], torch.arange(10, dtype=torch.float64)[None]
    return {
        "logits": torch.sin(7 * i + 3 * j + 1),
        "teacher_logits": 2 * torch.cos(5 * i + 2 * j + 0.5),
        "labels": torch.tensor([0, 3, 6, 9]),
        "hidden": draw(6, 5),
        "weight": draw(13, 5),
        "teacher_hidden": draw(6, 4),
        "teacher_weight": draw(13, 4),
        "maps": draw(3, 2, 4, 4),
        "teacher_maps": draw(3, 5, 4, 4),
    }


@pytest.fixture(scope="module")
def theirs(numbers, tmp_path_factory):
    path = tmp_path_factory.mktemp("peers") / "numbers.pt"
    torch.save(numbers, path)
    done = subprocess.run(
        [PEERS, "-W", "ignore", ROOT / "tests/peers/divergences.py", path], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def jsd(beta):
    """The divergence that TRL and Liger compute for a beta: a KL at the ends, by a special case."""
    end = WEIGHTS.get(str(float(beta)))
    return end or (lambda s, t, **more: jensen_shannon(s, t, teacher_weight=float(beta), **more))


def test_trl_gkd(numbers, theirs):
    """TRL's generalised JSD: beta weighs the teacher; no T^2; the mean over labelled positions. At 0 it jumps.

    Without labels TRL divides by the number of sequences, not of positions.
    """
    for key, value in theirs["gkd"].items():
        beta, temperature = key.split(",")
        ours = jsd(beta)(numbers["logits"], numbers["teacher_logits"], temperature=float(temperature))
        assert value == pytest.approx(ours.mean().item(), rel=1e-6), key
    assert theirs["gkd"]["0.0,1.0"] > 100 * theirs["gkd"]["0.001,1.0"]


@pytest.mark.parametrize("library", ["trl_tiled", "liger"])
def test_heads_with_their_gradients(numbers, theirs, library):
    """Losses from hidden states and heads: value and gradient. TRL's tiles are float32; softcap 3 for TRL's student.

    Liger multiplies the gradient of its loss as it does the value: neither by T^2. It has no softcap.
    """
    teacher = Projected(numbers["teacher_hidden"], numbers["teacher_weight"])
    for beta, found in theirs[library].items():
        hidden = numbers["hidden"].clone().requires_grad_()
        student = Projected(hidden, numbers["weight"], softcap=3.0 if library == "trl_tiled" else None)
        loss = jsd(beta)(student, teacher, temperature=2.0).mean()
        loss.backward()
        assert found["value"] == pytest.approx(loss.item(), rel=1e-4), beta
        gradient = torch.tensor(found["gradient"], dtype=torch.float64)
        torch.testing.assert_close(gradient, hidden.grad, rtol=1e-3, atol=1e-6)


def test_torchdistill_kd(numbers, theirs):
    """torchdistill drops T^2 when alpha is 0 or there are no labels: at T = 4, 16 times below alpha = 1e-300."""
    ours = forward_kl(numbers["logits"], numbers["teacher_logits"], temperature=4.0).mean().item()
    assert theirs["torchdistill"]["kd"] == pytest.approx(ours)
    assert theirs["torchdistill"]["kd_with_labels"] == pytest.approx(16 * ours)


def test_torchdistill_relations(numbers, theirs):
    """AT (mode 'code') and RKD: means over the examples of ours.

    SP is not: torchdistill 1.1.5 divides rows by their L1 norm (normalize(x, 1) sets p), the paper by their L2 norm.
    """
    points = numbers["hidden"], numbers["teacher_hidden"]
    found = theirs["torchdistill"]
    assert likeness.attention_transfer(numbers["maps"], numbers["teacher_maps"]).mean() == pytest.approx(found["at"])
    assert likeness.relational_distance(*points).mean() == pytest.approx(found["rkd_distance"])
    assert likeness.relational_angle(*points).mean() == pytest.approx(found["rkd_angle"])
    in_l1, in_l2 = ([torch.nn.functional.normalize(x @ x.t(), p=p) for x in points] for p in (1, 2))
    assert (in_l1[0] - in_l1[1]).square().mean() == pytest.approx(found["sp"])
    assert (in_l2[0] - in_l2[1]).square().mean() == pytest.approx(likeness.similarity_preserving(*points).mean().item())
