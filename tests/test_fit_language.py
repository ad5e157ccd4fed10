"""Language students in training: how it is split, packed, interrupted or kept in memory changes nothing."""

import ctypes
import dataclasses
import gc
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import stillroom as sr
from fit_fakes import apart, rows, same
from fit_fakes import student as small_network
from fit_language_script import ADAM, BOTH, TRAININGS, trained
from language_fakes import packed, student, teacher, texts, tokenizer
from stillroom.data import pack, render_apart
from stillroom.digests import data_description
from stillroom.errors import DataError, PairError, UsageError
from stillroom.language import tokenizer_digest
from stillroom.language.chat import Chat
from stillroom.plan import micro_batches
from stillroom.students import causal
from stillroom.students.networks import load_student
from stillroom.teachers.causal import from_causal
from stillroom.teachers.rendering import in_own_rendering

SCRIPT = Path(__file__).parent / "fit_language_script.py"


@pytest.mark.parametrize("start", [student, lambda: causal.lora(student(), 4)], ids=["plain", "lora"])
def test_checkpointing_changes_no_value(start):
    """Activations that are computed again are the same, and the network is given back as it was."""
    kept, again = trained(start()), trained(start(), checkpointing=True)
    assert same(kept, again)
    assert not any(getattr(module, "gradient_checkpointing", False) for module in again.net.modules())


def test_checkpointing_draws_the_same_dropout_again():
    def start():
        made = student()
        made.net.config.attention_dropout = 0.3
        for layer in made.net.get_decoder().layers:
            layer.self_attn.attention_dropout = 0.3
        return made

    kept, again = trained(start()), trained(start(), checkpointing=True)
    assert same(kept, again)
    assert not same(kept, trained(student()))


def test_checkpointing_is_refused_where_there_are_no_layers_for_it():
    plan = sr.Plan(steps=1, checkpointing=True)
    with pytest.raises(UsageError, match=r"plan.checkpointing=True is not possible for Sequential: it is no transf"):
        sr.fit(small_network(), None, rows(), sr.HardLabels(), plan=plan, progress=False)
    with pytest.raises(UsageError, match="plan.checkpointing is true or false, not 1"):
        sr.Plan(checkpointing=1)


@pytest.mark.parametrize("average", ["position", "example"])
@pytest.mark.parametrize("objective", [BOTH, sr.SoftTargets(), sr.HardLabels()], ids=["both", "soft", "hard"])
def test_accumulation_changes_nothing(average, objective):
    """trl#4719, trl#6478, ms-swift#10165, DistillKit: each micro-batch averaged for itself, whatever it counts."""
    assert len(packed()) % 4, "the last batch of an epoch must be ragged"
    whole, split = (trained(objective=objective, average=average, accumulation=n) for n in (1, 3))
    assert apart(whole, split) < 1e-6
    assert apart(whole, student()) > 1e-3


def test_packed_rows_train_as_one_document_a_row():
    """Loss and weights: no attention, no label and no position across documents."""
    own, wanted = tokenizer(), texts()
    together, alone = (pack(wanted, own, 32, together=value) for value in (True, False))
    assert len(together) < len(alone)
    losses = {}
    for name, data in (("together", together), ("alone", alone)):
        seen: list[float] = []
        settings = {"batch_size": len(data), "steps": 3, "watchers": [lambda row, seen=seen: seen.append(row.loss)]}
        losses[name] = (trained(examples=data, **settings), seen)
    assert losses["together"][1] == pytest.approx(losses["alone"][1], rel=1e-5)
    assert apart(losses["together"][0], losses["alone"][0]) < 1e-6


def test_half_precision_trains_and_masters_stay_whole():
    exact, half = trained(**ADAM), trained(precision="bf16", **ADAM)
    assert 0 < apart(exact, half) < 2e-2
    assert {p.dtype for p in half.net.parameters()} == {torch.float32}


def outcome(folder):
    return [(folder / name).read_bytes() for name in ("model.safetensors", "history.jsonl")]


def test_a_killed_training_goes_on_from_the_middle_of_an_epoch(tmp_path):
    """easydistill#18, trl#6987: another process ends with the bytes of one that was never killed."""
    command = [sys.executable, str(SCRIPT), str(tmp_path), "adam@4"]
    assert subprocess.run(command, capture_output=True).returncode == -signal.SIGKILL
    checkpoint = torch.load(tmp_path / "adam" / "checkpoint.pt", weights_only=True)
    assert checkpoint["step"] % sr.Plan(batch_size=4).steps_per_epoch(len(packed()))
    TRAININGS["adam"](folder=tmp_path / "adam")
    TRAININGS["adam"](folder=tmp_path / "whole")
    assert outcome(tmp_path / "adam") == outcome(tmp_path / "whole")


@pytest.mark.parametrize("name", ["lora", "half", "checkpointed"])
def test_an_interrupted_training_goes_on(tmp_path, name):
    def stop(row):
        if row.step == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        TRAININGS[name](folder=tmp_path / "cut", checkpoint_seconds=0, watchers=[stop])
    TRAININGS[name](folder=tmp_path / "cut")
    TRAININGS[name](folder=tmp_path / "whole")
    assert outcome(tmp_path / "cut") == outcome(tmp_path / "whole")


def test_a_recorded_answer_follows_its_row_under_shuffling(tmp_path):
    """EasyDistill 1: cached logits misaligned by the default shuffle, and the loss divided by the mask's sum twice."""
    data = packed()
    recording = sr.record(teacher(), data, tmp_path / "r", sr.Everything(), progress=False)
    asked, read = trained(examples=data), trained(examples=data, by=recording)
    assert apart(asked, read) < 1e-6
    orders = [[batch.ids for batch, _ in micro_batches(sr.Plan(batch_size=4), data, step)] for step in (0, 2)]
    assert orders[0] != orders[1]


def swapped():
    """A tokenizer of the same size in which two ids have changed places."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    own = tokenizer()
    content = json.loads(own.backend_tokenizer.to_str())
    vocabulary = content["model"]["vocab"]
    vocabulary["!"], vocabulary['"'] = vocabulary['"'], vocabulary["!"]
    made = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(content)), eos_token="<|im_end|>")
    made.chat_template = own.chat_template
    return made


@pytest.mark.parametrize("recorded", [False, True], ids=["live", "recorded"])
def test_another_tokenizer_of_equal_size_is_refused(tmp_path, recorded):
    """trl#4562, DistillKit#29, #7, #12: the same ids, other words, silently wrong. Before anything is trained."""
    other = swapped()
    assert len(other) == len(tokenizer())
    foreign = from_causal(student(seed=5).net, other)
    own, theirs = tokenizer_digest(tokenizer()), tokenizer_digest(other)
    by, whose = foreign, "teacher 'LlamaForCausalLM'"
    if recorded:
        data = pack(texts(), other, 32)
        by, whose = sr.record(foreign, data, tmp_path / "r", sr.TopK(4), progress=False), "recording of 'LlamaForC"
    with pytest.raises(PairError, match=f"the student has the tokenizer {own}, the {whose}.* {theirs}. The same ids"):
        trained(by=by, folder=tmp_path / "s")
    with pytest.raises(PairError, match=f"the student has the tokenizer {own}, the examples {theirs}"):
        trained(examples=pack(texts(), other, 32), folder=tmp_path / "s")
    assert not (tmp_path / "s").exists()


def test_chats_in_another_template_than_the_teachers_are_refused():
    """OPSD#10, Rethinking-OPD#18: a teacher asked in a rendering that it does not know."""
    chats = [(f"c{n}", [{"role": "user", "content": "cat?"}, {"role": "assistant", "content": text}])
             for n, text in enumerate(texts(6))]  # fmt: skip
    own = pack(chats, tokenizer(), 64, chat=Chat())
    trained(examples=own, steps=1)
    other = Chat(template="<|im_start|>" + tokenizer().chat_template)
    with pytest.raises(PairError, match=r"the student has the template \w{64}, the examples \w{64}. Chats would be"):
        trained(examples=pack(chats, tokenizer(), 64, chat=other), steps=1)
    apart = render_apart(chats, tokenizer(), other, Chat(), 64)
    trained(examples=apart, by=in_own_rendering(teacher()), steps=1)


def test_a_corpus_on_disk_is_trained_without_being_read_first(tmp_path):
    """Memory-mapped rows: a training asks for the rows of its batches, and for no others."""
    held = packed()
    pack(texts(), tokenizer(), 32, tmp_path / "c")
    stored = pack([], tokenizer(), 32, tmp_path / "c")
    assert data_description(stored) == data_description(held)
    assert data_description(stored.select(range(5))) == data_description(held.select(range(5)))
    recording = sr.record(teacher(), held, tmp_path / "r", sr.TopK(4), progress=False)
    asked: list[int] = []

    class Watched:
        def __getattr__(self, name):
            return getattr(stored, name)

        def __len__(self):
            return len(stored)

        def batch(self, indices, views=None):
            asked.extend(indices)
            return stored.batch(indices, views)

    from_disk = trained(examples=Watched(), by=recording, steps=2, batch_size=2)
    assert len(asked) == 4
    assert same(from_disk, trained(examples=held, by=recording, steps=2, batch_size=2))


@pytest.mark.slow
def test_a_corpus_larger_than_what_memory_grows_by(tmp_path):
    """240 MB of rows in a process that grows by less than 60 MB (its own, not the pages of the files)."""
    script = Path(__file__).parent / "fit_language_script.py"
    done = subprocess.run([sys.executable, str(script), str(tmp_path), "large"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    grown, size = (float(word) for word in done.stdout.split()[-2:])
    assert size >= 240
    assert grown < 60


def masked(data, rows):
    """The same data in which nothing counts in these rows."""
    labels = data.labels.copy()
    labels[rows] = -100
    return dataclasses.replace(data, labels=labels)


@pytest.mark.parametrize("objective", [BOTH, sr.SoftTargets(), sr.HardLabels()], ids=["both", "soft", "hard"])
@pytest.mark.parametrize("average", ["position", "example"])
def test_a_micro_batch_in_which_nothing_counts(objective, average):
    """trl#5594, Liger#974: NaN from a ragged or all-masked batch."""
    data = masked(packed(), [0, 3])
    whole, split = (trained(examples=data, objective=objective, average=average, accumulation=n) for n in (1, 4))
    assert apart(whole, split) < 1e-6
    assert all(bool(p.isfinite().all()) for p in split.net.parameters())
    with pytest.raises(DataError, match=r"no position counts in the batch of \['row 0"):
        trained(examples=masked(data, slice(None)), objective=sr.SoftTargets(), average=average)


def peak_of(run, times=3):
    """MiB by which this process rose at most while it ran; the least of several runs, since the allocator rounds up."""
    found = []
    for _ in range(times):
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # memory that is kept for later would hide what the run takes
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
        before = _memory("VmRSS")
        run()
        found.append(_memory("VmHWM") - before)
    return min(found)


def _memory(name):
    return int(Path("/proc/self/status").read_text().split(f"{name}:")[1].split()[0]) / 1024


@dataclasses.dataclass(frozen=True)
class Hoarding:
    """SoftTargets that keeps the logits of every micro-batch: the defect itself."""

    kept: list = dataclasses.field(default_factory=list)

    def __call__(self, student, teacher, batch):
        logits = student.logits
        self.kept.append(logits.values if isinstance(logits, sr.Dense) else logits.compute())
        return sr.SoftTargets()(student, teacher, batch)


@pytest.mark.slow
def test_memory_does_not_grow_with_accumulation():
    """ms-swift#10097: the logits of every micro-batch of a step were alive at once, 256 of [B, T, V]."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    net = LlamaForCausalLM(LlamaConfig(vocab_size=40_000, tie_word_embeddings=True, **shape))
    wide, data = causal.from_causal(net, tokenizer()), pack(texts(400), tokenizer(), 64)
    assert len(data) >= 64
    one = 4 * 64 * 40_000 * 4 / 2**20  # MiB of the logits of a micro-batch

    def run(parts, objective=sr.SoftTargets):
        settings = {"steps": 1, "batch_size": 4 * parts, "accumulation": parts}
        return lambda: trained(wide, data, objective=objective(), **settings)

    run(1)()  # what is compiled and loaded once
    few, many = peak_of(run(1)), peak_of(run(10))
    assert many < few + one
    assert peak_of(run(10, Hoarding)) > few + 5 * one, "what the defect would show"


def test_a_lora_student_of_a_recording(tmp_path):
    """axolotl#3206, trl#6610: frozen heads under LoRA, and top-k targets from a file. Trained, saved, opened again."""
    data, start = packed(), causal.lora(student(), 4)
    recording = sr.record(teacher(), data, tmp_path / "r", sr.TopK(8), progress=False)
    losses: list[float] = []
    settings = {"watchers": [lambda row: losses.append(row.loss)], **ADAM, "learning_rate": 3e-2, "steps": 30}
    made = trained(start, data, recording, sr.SoftTargets(temperature=1.0), folder=tmp_path / "s", **settings)
    assert losses[-1] < losses[0] - 0.02
    assert {name for name, p in made.net.named_parameters() if p.grad is not None} == set()
    frozen = {name: p for name, p in start.net.named_parameters() if not p.requires_grad}
    assert all(torch.equal(p, made.net.get_parameter(name)) for name, p in frozen.items())
    batch = data.batch(range(len(data)))
    ours, opened = (model.predict(batch).need_logits().compute() for model in (made, load_student(tmp_path / "s")))
    torch.testing.assert_close(ours, opened, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("count", [1, 3, 4, 7, 9])
def test_ranks_take_the_same_number_of_passes(count):
    """A student that is shared out needs all ranks for each pass: one pass more on one of them would wait for ever."""
    data = packed().select(range(count))
    plan = sr.Plan(batch_size=9, accumulation=2)
    ranks = [micro_batches(plan, data, 0, rank=rank, ranks=2) for rank in (0, 1)]
    assert len(ranks[0]) == len(ranks[1]) <= 2
    seen = [name for parts in ranks for batch, weight in parts if weight for name in batch.ids]
    assert sorted(seen) == sorted(data.ids)
