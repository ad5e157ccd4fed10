"""Features: hooks that leave no trace, projectors that train and stay behind."""

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fit_fakes import WIDTH, apart, rows, same, seeded, student, teacher, trained
from stillroom.errors import ShapeError, SignalError, UsageError
from stillroom.likeness import attention_transfer, mean_squared, relational_distance
from stillroom.network import captured
from stillroom.objectives import HardLabels, Mix, SoftTargets, built
from stillroom.objectives.features import MatchFeatures, MatchRelations
from stillroom.types import Batch, Signal


class Twice(nn.Module):
    """One module, called twice, and one that gives a tuple."""

    def __init__(self):
        super().__init__()
        self.shared = nn.Linear(3, 3)
        self.pair = Pair()

    def forward(self, x):
        return self.shared(self.shared(x) + 1) + self.pair(x)[0]


class Pair(nn.Module):
    def forward(self, x):
        return x * 2, x


def test_hooks_catch_modules_at_dotted_paths():
    inner = nn.Sequential(nn.Linear(3, 4), nn.Sequential(nn.Linear(4, 5), nn.ReLU()))
    x = torch.randn(2, 3)
    with captured(inner, ("0", "1.0", "1")) as caught:
        output = inner(x)
    torch.testing.assert_close(caught["0"], inner[0](x))
    torch.testing.assert_close(caught["1.0"], inner[1][0](inner[0](x)))
    assert caught["1"] is output


def test_a_module_called_twice_gives_both_outputs():
    """torchdistill core/forward_hook.py: a shared module called twice overwrites its output."""
    twice, x = Twice(), torch.randn(2, 3)
    with captured(twice, ("shared", "pair")) as caught:
        twice(x)
    torch.testing.assert_close(caught["shared"], twice.shared(x))
    torch.testing.assert_close(caught["shared#2"], twice.shared(caught["shared"] + 1))
    assert torch.equal(caught["pair"], x * 2)


def test_two_networks_do_not_interfere():
    """torchdistill core/forward_hook.py: hooks set on the class, so two boxes interfere."""
    one, two, x = Twice(), Twice(), torch.randn(2, 3)
    with captured(one, ("shared",)) as ours, captured(two, ("pair",)) as theirs:
        two(x)
        one(x)
    assert set(ours) == {"shared", "shared#2"}
    assert set(theirs) == {"pair"}


def hooks(module):
    return [hook for part in module.modules() for hook in part._forward_hooks.values()]


def test_hooks_are_removed_even_after_an_error():
    twice = Twice()
    with captured(twice, ("shared",)):
        assert len(hooks(twice)) == 1
    with pytest.raises(RuntimeError), captured(twice, ("shared",)):
        twice(torch.randn(2, 7))
    with (
        pytest.raises(UsageError, match=r"no module 'shard'; did you mean 'shared'\?"),
        captured(twice, ("pair", "shard")),
    ):
        pass
    assert hooks(twice) == []


def test_hooks_work_under_distributed_wrappers(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        twice, x = Twice(), torch.randn(2, 3)
        with captured(DistributedDataParallel(twice), ("shared",)) as caught:
            output = DistributedDataParallel(twice)(x)
        torch.testing.assert_close(caught["shared"], twice.shared(x))
        assert output.shape == (2, 3)
    finally:
        torch.distributed.destroy_process_group()


def sides(ours, theirs):
    return Signal(features={"a": ours}), Signal(features={"b": theirs})


def batch(count=2, **rest):
    return Batch(tuple(map(str, range(count))), {}, **rest)


def test_features_by_hand():
    ours, theirs = sides(torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.tensor([[1.0, 4.0], [2.0, 2.0]]))
    terms = MatchFeatures({"a": "b"})(ours, theirs, batch())
    assert {name: values.tolist() for name, values in terms.items()} == {"features.a": [2.0, 4.0]}


def test_maps_become_one_number_per_example():
    ours, theirs = sides(torch.zeros(2, 3, 4, 5), torch.ones(2, 3, 4, 5))
    theirs.features["b"][1] = 2
    assert MatchFeatures({"a": "b"})(ours, theirs, batch())["features.a"].tolist() == [1.0, 4.0]


def test_positions_keep_their_own_number_and_masked_ones_are_removed():
    ours, theirs = sides(torch.zeros(2, 3, 4, requires_grad=True), torch.ones(2, 3, 4))
    theirs.features["b"][0, 2] = float("nan")
    mask = torch.tensor([[True, True, False], [True, False, False]])
    found = MatchFeatures({"a": "b"})(ours, theirs, batch(mask=mask))["features.a"]
    assert found.tolist() == [[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]]
    found.sum().backward()
    assert bool(ours.features["a"].grad.isfinite().all())
    assert MatchFeatures({"a": "b"})(ours, sides(ours.features["a"], torch.ones(2, 3, 4))[1], batch())[
        "features.a"
    ].tolist() == [1.0, 1.0]
    with pytest.raises(ShapeError, match=r"\[2, 3, 4\], but the positions are \[2, 9\]"):
        MatchFeatures({"a": "b"})(ours, theirs, batch(mask=torch.ones(2, 9, dtype=torch.bool)))


@pytest.mark.parametrize(
    ("ours", "theirs", "weight"),
    [((2, 3), (2, 5), (5, 3)), ((2, 7, 3), (2, 7, 5), (5, 3)), ((2, 3, 4, 4), (2, 5, 4, 4), (5, 3, 1, 1))],
)
def test_projectors_fit_the_widths(ours, theirs, weight):
    signals = sides(torch.randn(ours), torch.randn(theirs))
    objective, modules = built(MatchFeatures({"a": "b"}), *signals)
    assert [tuple(p.shape) for p in modules[0].parameters()] == [weight, (5,)]
    found = objective(*signals, batch())["features.a"]
    assert found.shape == (2,) or found.shape == (2, 7)
    with pytest.raises(ShapeError, match="the student's 'a' gives"):
        built(MatchFeatures({"a": "b"}, projector="none"), *signals)[0](*signals, batch())


def test_equal_widths_need_no_projector():
    _, modules = built(MatchFeatures({"a": "b"}), *sides(torch.randn(2, 3), torch.randn(2, 3)))
    assert list(modules[0].parameters()) == []


def test_attention_is_compared_map_by_map():
    """Widths may differ, channels are not moved, and nothing is learned."""
    ours, theirs = sides(torch.randn(2, 3, 4, 4), torch.randn(2, 5, 4, 4))
    objective, modules = built(MatchFeatures({"a": "b"}, attention_transfer), ours, theirs)
    assert list(modules[0].parameters()) == []
    wanted = attention_transfer(ours.features["a"], theirs.features["b"])
    torch.testing.assert_close(objective(ours, theirs, batch())["features.a"], wanted)


def test_shapes_that_do_not_fit_are_shown():
    with pytest.raises(ShapeError, match=r"'a' gives \[2, 3, 4\] and the teacher's 'b' gives \[2, 3\]"):
        built(MatchFeatures({"a": "b"}), *sides(torch.randn(2, 3, 4), torch.randn(2, 3)))
    ours, theirs = sides(torch.randn(2, 3, 4, 4), torch.randn(2, 5, 8, 8))
    with pytest.raises(ShapeError, match=r"\[2, 5, 4, 4\].*\[2, 5, 8, 8\]"):
        built(MatchFeatures({"a": "b"}), ours, theirs)[0](ours, theirs, batch())
    ours, theirs = sides(torch.randn(2, 3), torch.randn(2, 3))
    with pytest.raises(ShapeError, match="compares position by position"):
        MatchFeatures({"a": "b"}, lambda a, b: (a - b).square())(ours, theirs, batch())


def test_missing_features_and_unusable_pairs():
    with pytest.raises(SignalError, match=r"the teacher's features\['b'\], but it gives \['values'\]"):
        MatchFeatures({"a": "b"})(sides(torch.randn(2, 3), None)[0], Signal(values=torch.zeros(2, 3)), batch())
    with pytest.raises(UsageError, match="at least one pair"):
        MatchFeatures({})
    with pytest.raises(UsageError, match="occurs twice"):
        MatchFeatures((("a", "b"), ("a", "c")))
    with pytest.raises(UsageError, match="choose 'auto' or 'none'"):
        MatchFeatures({"a": "b"}, projector="linear")


def test_relations_leave_masked_examples_out():
    ours, theirs = torch.randn(4, 3), torch.randn(4, 5)
    mask = torch.tensor([True, True, False, True])
    wanted = relational_distance(ours[mask], theirs[mask])
    ours[2] = float("nan")
    found = MatchRelations()(Signal(values=ours), Signal(values=theirs), batch(4, mask=mask))["match_relations"]
    torch.testing.assert_close(found[mask], wanted)
    assert found[2] == 0


# in training


PAIR = MatchFeatures({"0": "0"})  # 8 wide and 16 wide


def test_a_projector_trains_with_the_student_and_is_not_exported(tmp_path):
    watched = []
    start = student()
    found = trained(PAIR, rows(), by=teacher(), start=start, steps=60, folder=tmp_path / "s", watchers=[watched.append])
    assert set(found.net.state_dict()) == set(start.net.state_dict())
    assert watched[-1].loss < 0.7 * watched[0].loss
    assert found.features == ()
    assert set(watched[0].terms) == {"features.0"}


def test_the_projector_itself_learns():
    """The loss ends below what any of five drawn projectors gives at the start."""
    losses = []
    trained(PAIR, rows(), by=teacher(), steps=200, watchers=[lambda row: losses.append(row.loss)])
    target = teacher().net[0](rows().columns["x"]).detach()
    best_of_random = []
    for seed in range(5):
        projector = seeded(nn.Linear, seed, in_features=8, out_features=16)
        ours = student().net[0](rows().columns["x"]).detach()
        best_of_random.append(float(mean_squared(projector(ours), target).mean().detach()))
    assert losses[-1] < 0.5 * min(best_of_random)


def test_several_features_and_soft_targets_together():
    objective = Mix({SoftTargets(): 1.0, MatchFeatures({"0": "0", "3": "3"}): 0.5, HardLabels(): 0.1})
    rowed = []
    trained(objective, rows(), by=teacher(), watchers=[rowed.append])
    assert set(rowed[0].terms) == {"soft_targets", "features.0", "features.3", "hard_labels"}


def test_the_hooks_of_a_run_are_gone_afterwards():
    start, guide = student(), teacher()
    found = trained(PAIR, rows(), by=guide, start=start)
    assert hooks(found.net) == hooks(start.net) == hooks(guide.net) == []
    assert guide.features == ()


def test_splitting_and_repeating_change_nothing_with_a_projector():
    whole = trained(PAIR, rows(), by=teacher())
    assert same(whole, trained(PAIR, rows(), by=teacher()))
    assert apart(whole, trained(PAIR, rows(), by=teacher(), accumulation=3)) < 1e-6


def test_wrong_paths_name_the_nearest():
    with pytest.raises(UsageError, match="has no module '9'"):
        trained(MatchFeatures({"9": "0"}), rows(), by=teacher())


class Loop(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell = nn.Linear(WIDTH, WIDTH)
        self.output = nn.Linear(WIDTH, 4)

    def forward(self, x):
        return self.output(self.cell(torch.tanh(self.cell(x))))


def test_the_second_call_of_a_module_can_be_matched():
    from stillroom.students.networks import Student
    from stillroom.teachers.networks import from_network

    found = trained(
        MatchFeatures({"cell#2": "cell#2"}), rows(), by=from_network(seeded(Loop, 3)), start=Student(seeded(Loop))
    )
    assert not torch.equal(found.net.cell.weight, seeded(Loop).cell.weight)
    assert torch.equal(found.net.output.weight, seeded(Loop).output.weight)  # nothing reaches it


def test_relations_train_on_whole_batches_only():
    objective = MatchRelations(student_path="3", teacher_path="3")
    assert not same(trained(objective, rows(), by=teacher()), student())
    with pytest.raises(UsageError, match="accumulation=2"):
        trained(objective, rows(), by=teacher(), accumulation=2)
