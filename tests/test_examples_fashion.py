"""The example of clothes, small: a teacher with ImageNet's features, its answers recorded, a student in int8."""

from pathlib import Path

import pytest
import torch

from stillroom import settings
from stillroom.run import open_run
from stillroom.students.rounding import rounded_layers

EXAMPLES = Path(__file__).parents[1] / "examples"
IMAGES = Path("/usr/share/datasets/fashion-mnist")
SMALL = (
    "threads=1",
    "data.train.rows=80",
    "data.test.rows=20",
    "data.labels.count=40",
    "teacher.pixels=32",
    "teacher.epochs=1",
    "record.views=1",
    "fit.epochs=1",
    "baseline=null",
)

pytestmark = pytest.mark.skipif(not IMAGES.is_dir(), reason="needs Debian's dataset-fashion-mnist")


def test_the_student_is_small_enough_for_a_phone():
    """At most 100,000 parameters, and as many bytes of weights in int8."""
    make = settings.resolve("fashion.py:small", EXAMPLES)
    net = make(10, width=12)
    assert sum(parameter.numel() for parameter in net.parameters()) <= 100_000
    assert net(torch.rand(2, 28, 28)).shape == (2, 10)


def test_the_recipe_runs_in_small(tmp_path):
    """Teacher, recording, both parts of the training; the upper blocks have learned, the lower ones have not."""
    pytest.importorskip("efficientnet_lite_pytorch")
    run = open_run(EXAMPLES / "fashion.yaml", tmp_path / "run", SMALL, progress=False)
    run.record()
    trained = run.fit()
    assert len(rounded_layers(trained["student"][0].net)) == 6
    said = run.teacher(run.data["test"].batch(range(20))).logits.values
    assert said.shape == (20, 10)
    assert said.isfinite().all()
