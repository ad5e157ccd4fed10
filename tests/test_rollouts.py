"""On-policy batches: what the student writes, how it is laid out and counted; a resumed training is the same."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import rollouts_script
import stillroom as sr
from fit_ranks import COPIED, SHARED, on_two_ranks
from stillroom.data import pack
from stillroom.divergences import reverse_kl
from stillroom.errors import DataError, PairError, UsageError
from stillroom.language.chat import Chat
from stillroom.language.writing import Written, write
from stillroom.objectives.on_policy import SampledReverseKL
from stillroom.plan import Plan
from stillroom.rollouts import Rollouts
from stillroom.rollouts.rows import Tally, counts_of, degenerate, looping, prompts_of, rows_of
from stillroom.students import causal
from stillroom.teachers.causal import from_causal

PROMPTS = ["the cat", "a dog ran after it and", "it", "the mat sat on the dog and the cat", "after", "on the mat"]
REVERSE = sr.SoftTargets(reverse_kl, temperature=1.0)


@pytest.fixture(scope="module")
def teacher(small_tokenizer):
    return from_causal(causal.fresh(small_tokenizer, hidden=32, layers=2, heads=2, seed=1).net, small_tokenizer)


@pytest.fixture
def student(small_tokenizer):
    return causal.fresh(small_tokenizer, hidden=16, layers=1, heads=2)


@pytest.fixture(scope="module")
def prompts(small_tokenizer):
    return pack(PROMPTS, small_tokenizer, 32, together=False)


def test_the_real_model_writes_the_same_alone_and_among_others(smollm2):
    """Prompts of other lengths are padded on the left, and no draw is shared: neither may show."""
    texts = ["The capital of France is", "Once upon a time, there was a little", "Hi"]
    ids = [smollm2.tokenizer(text).input_ids for text in texts]
    draws = torch.rand(3, 8, generator=torch.Generator().manual_seed(0))
    together = write(smollm2.net, ids, draws, ends=(2, 0))
    assert "Paris" in smollm2.tokenizer.decode(together[0].tokens)
    for row in range(3):
        (alone,) = write(smollm2.net, ids[row : row + 1], draws[row : row + 1], ends=(2, 0))
        assert alone.tokens == together[row].tokens
        assert alone.log_probs == pytest.approx(together[row].log_probs, abs=1e-4)


def test_behaviour_is_what_the_model_itself_says_of_what_it_wrote(smollm2, smollm2_teacher):
    """Written by generation with a cache and left padding, scored as packed rows: one number both ways."""
    ids = [smollm2.tokenizer(text).input_ids for text in ("The capital of France is", "Hi")]
    written = write(smollm2.net, ids, torch.rand(2, 8), ends=(2, 0))
    batch = rows_of(("a", "b"), ids, written, 2, None)
    logits = smollm2_teacher(batch).need_logits().compute()
    scored = -torch.nn.functional.cross_entropy(logits[batch.mask], batch.labels[batch.mask], reduction="none")
    torch.testing.assert_close(scored, batch.extra["behaviour"][batch.mask], atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (1.0, 0.6)])
def test_tokens_are_drawn_with_the_probability_that_is_kept_beside_them(student, temperature, top_p):
    count = 4000
    draws = ((torch.arange(count) + 0.5) / count).view(-1, 1)  # one of each quantile
    written = write(student.net, [[5, 6]] * count, draws, ends=(2,), temperature=temperature, top_p=top_p)
    logits = student.net(torch.tensor([[5, 6]])).logits[0, -1].detach() / temperature
    wanted = logits.softmax(-1)
    if top_p < 1:
        order = wanted.argsort(descending=True)
        kept = order[wanted[order].cumsum(0) - wanted[order] < top_p]
        wanted = torch.zeros_like(wanted).index_copy(0, kept, wanted[kept] / wanted[kept].sum())
    chosen = torch.tensor([text.tokens[0] for text in written])
    frequency = torch.bincount(chosen, minlength=len(wanted)) / count
    assert float((frequency - wanted).abs().max()) <= 1.01 / count
    said = torch.tensor([text.log_probs[0] for text in written])
    torch.testing.assert_close(said, wanted[chosen].log(), atol=1e-4, rtol=1e-4)


def test_no_setting_of_the_models_own_generation_is_used(student):
    """A repetition penalty in generation_config.json would change what is drawn, not what is said to be."""
    draws = torch.full((1, 12), 0.3)
    plain = write(student.net, [[5, 6, 5, 6]], draws, ends=(2,))
    own = student.net.generation_config
    own.repetition_penalty, own.top_k, own.min_new_tokens = 50.0, 1, 12
    assert write(student.net, [[5, 6, 5, 6]], draws, ends=(2,)) == plain
    assert student.net.generation_config is own


def test_a_lora_student_writes_with_its_adapters(student):
    adapted = causal.lora(student, rank=2)
    draws = torch.full((1, 6), 0.4)
    before = write(adapted.net, [[5, 6]], draws, ends=(2,))
    assert before[0].log_probs == pytest.approx(write(student.net, [[5, 6]], draws, ends=(2,))[0].log_probs)
    for name, parameter in adapted.net.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    assert write(adapted.net, [[5, 6]], draws, ends=(2,))[0].log_probs != before[0].log_probs


def test_rows_hold_the_prompt_and_count_only_what_was_written():
    """By hand: two prompts, one text that ended and one that was cut."""
    lengths = torch.arange(10)
    texts = [Written((7, 2), (-0.5, -0.1), True), Written((4, 5, 6), (-1.0, -2.0, -3.0), False)]
    batch = rows_of(("a", "b"), [[1, 8, 9], [3]], texts, 2, lengths)
    assert batch.inputs["tokens"].tolist() == [[1, 8, 9, 7], [3, 4, 5, 2]]
    assert batch.labels.tolist() == [[-100, -100, 7, 2], [4, 5, 6, -100]]
    assert batch.mask.tolist() == [[False, False, True, True], [True, True, True, False]]
    assert batch.inputs["positions"][0].tolist() == [0, 1, 2, 3]
    assert batch.inputs["positions"][1].tolist() == [0, 1, 2, 0]
    torch.testing.assert_close(batch.extra["behaviour"], torch.tensor([[0, 0, -0.5, -0.1], [-1.0, -2.0, -3.0, 0]]))
    assert batch.extra["bytes"].tolist() == [[0, 0, 7, 2], [4, 5, 6, 0]]
    assert batch.extra["truncated"].tolist() == [False, True]
    counts = counts_of([(batch, 1.0), (batch, 0.0)])
    assert counts == {"texts": 2.0, "tokens": 5.0, "truncated": 1.0, "degenerate": 0.0}


@pytest.mark.parametrize(
    ("tokens", "wanted"),
    [
        ([1, 2, 3, 4, 5, 6, 7, 8], False),
        ([1] * 7, False),
        ([9, *[1] * 8, 9], True),
        ([1, 2] * 3 + [1], False),
        ([1, 2] * 4, True),
        ([5, *[1, 2, 3] * 4, 7], True),
        ([1, 2, 3] * 3 + [1, 2, 4], False),
        (list(range(17)) * 4, False),
    ],
)
def test_a_loop_is_a_few_tokens_four_times_in_a_row(tokens, wanted):
    assert looping(tokens) is wanted


def test_the_terminal_is_told_what_is_wrong_with_the_texts():
    tally = Tally()
    assert tally.note() == ""
    tally.add({"texts": 3.0, "tokens": 20.0, "truncated": 2.0, "degenerate": 1.0})
    tally.add({"texts": 1.0, "tokens": 1.0, "truncated": 0.0, "degenerate": 0.0})
    assert tally.note() == ", wrote 4 (50% truncated, 25% degenerate)"


def test_an_empty_text_is_degenerate():
    assert degenerate(Written((2,), (-1.0,), True))
    assert not degenerate(Written((5,), (-1.0,), False))


def test_a_prompt_is_a_whole_row_or_its_beginning_or_all_before_the_answer(small_tokenizer, prompts):
    batch = prompts.batch([1, 2])
    whole = prompts_of(batch, "whole")
    assert whole[1] == [*batch.inputs["tokens"][1, : len(whole[1])].tolist()]
    assert small_tokenizer.decode(whole[0]).endswith("a dog ran after it and")
    assert prompts_of(batch, 2) == [row[:2] for row in whole]
    chats = [("one", [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat"}])]
    rows = pack(chats, small_tokenizer, 64, chat=Chat(), together=False)
    (ids,) = prompts_of(rows.batch([0]), "answer")
    assert small_tokenizer.decode(ids).endswith("assistant\n")


def test_rows_that_are_no_prompts_are_refused_by_name(small_tokenizer, prompts):
    packed = pack([("first", "the cat"), ("second", "it is")], small_tokenizer, 64)
    with pytest.raises(DataError, match=r"row '.*' is not one document, so no prompt. Pack prompts with together"):
        prompts_of(packed.batch([0]), "whole")
    batch = prompts.batch([0])
    blank = sr.Batch(batch.ids, batch.inputs, batch.labels, torch.zeros_like(batch.mask), extra=batch.extra)
    with pytest.raises(DataError, match=r"row '00000000' has no token to learn, so no answer begins in it"):
        prompts_of(blank, "answer")
    with pytest.raises(DataError, match=r"prompts are packed tokens: make them with stillroom.data.pack"):
        prompts_of(sr.Batch(("a",), {"x": torch.zeros(1, 2)}), "whole")


def plan(**settings):
    return Plan(**{"steps": 6, "batch_size": 4, "learning_rate": 3e-3, "seed": 5, **settings})


def joined(student, teacher, prompts, **settings):
    return Rollouts(prompts, **{"new_tokens": 6, **settings}).joined(student, teacher, REVERSE)


def test_the_split_of_a_batch_does_not_change_what_is_written(student, teacher, prompts):
    """trl#4719 and others in writing: neither accumulation nor ranks may matter."""
    rollouts = joined(student, teacher, prompts)
    ((whole, _),) = rollouts.batches(student, plan(), step=3)
    pieces = [rollouts.batches(student, plan(accumulation=2), 3, rank, 2) for rank in (0, 1)]
    texts = {}
    for batch, weight in [pair for piece in pieces for pair in piece]:
        assert weight == 1.0
        texts |= {name: batch.labels[row][batch.mask[row]].tolist() for row, name in enumerate(batch.ids)}
    assert texts == {name: whole.labels[row][whole.mask[row]].tolist() for row, name in enumerate(whole.ids)}


def test_another_step_and_another_seed_write_other_texts(student, teacher, prompts):
    rollouts = joined(student, teacher, prompts, batch_size=6)
    seen = {
        tuple(batch.labels[batch.mask].tolist())
        for settings, step in ((plan(), 0), (plan(), 1), (plan(seed=6), 0))
        for batch, _ in rollouts.batches(student, settings, step)
    }
    assert len(seen) == 3


def test_writing_is_without_dropout_and_leaves_the_student_training(student, teacher, prompts):
    student.net.config.attention_dropout = 0.9
    for layer in student.net.model.layers:
        layer.self_attn.attention_dropout = 0.9
    rollouts = joined(student, teacher, prompts)
    student.net.train()
    ((first, _),) = rollouts.batches(student, plan(), 0)
    torch.rand(3)
    ((again, _),) = rollouts.batches(student, plan(), 0)
    assert student.net.training
    assert torch.equal(first.labels, again.labels)
    assert torch.equal(first.extra["behaviour"], again.extra["behaviour"])


@pytest.mark.slow
@pytest.mark.parametrize("kind", [COPIED, SHARED], ids=["ddp", "fsdp"])
def test_two_ranks_write_and_learn_as_one(tmp_path, kind):
    """Texts, weights and counts: the ranks only share them out."""
    found = on_two_ranks(Path(__file__).parent / "rollouts_script.py", tmp_path, "all", kind)
    assert found.returncode == 0, found.stderr[-3000:]
    assert sorted(found.stdout.split()) == ["rank0/2", "rank1/2"]
    one = rollouts_script.train(tmp_path / "one").net.state_dict()
    two = load_file(tmp_path / "student" / "model.safetensors")
    assert max(float((one[key] - two[key]).abs().max()) for key in two) < 1e-5
    said = [json.loads((tmp_path / name / "student.json").read_text())["written"] for name in ("one", "student")]
    assert said[0] == said[1]


@pytest.mark.parametrize(("share", "wanted"), [(0.0, 0.0), (1.0, 1.0), (0.25, 0.25), ((0.0, 1.0), 0.5)])
def test_the_share_of_steps_that_are_on_policy(prompts, share, wanted):
    rollouts = Rollouts(prompts, share=share)
    due = [rollouts.due(plan(), step, 4000) for step in range(4000)]
    assert sum(due) / 4000 == pytest.approx(wanted, abs=0.03)
    if isinstance(share, tuple):
        assert sum(due[:1000]) < 200 < 800 < sum(due[3000:])


def train(student, teacher, prompts, folder=None, steps=12, watchers=(), **settings):
    rollouts = Rollouts(prompts, **{"new_tokens": 6, "share": 0.5, **settings})
    return sr.fit(
        student, teacher, prompts, REVERSE, plan=plan(steps=steps), rollouts=rollouts, folder=folder,
        checkpoint_seconds=0, progress=False, watchers=watchers,
    )  # fmt: skip


def test_a_resumed_training_writes_and_learns_the_same(student, teacher, prompts, tmp_path):
    """llm-peers 20 on-policy: weights, history and counts after an interruption are those of an uninterrupted run."""

    def stop(row):
        if row.step == 7:
            raise KeyboardInterrupt

    train(student, teacher, prompts, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(student, teacher, prompts, tmp_path / "cut", watchers=[stop])
    torch.rand(5)
    train(student, teacher, prompts, tmp_path / "cut")
    for name in ("model.safetensors", "history.jsonl"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "cut" / name).read_bytes()
    said = [json.loads((tmp_path / name / "student.json").read_text()) for name in ("whole", "cut")]
    assert said[0]["written"] == said[1]["written"]
    assert said[0]["training"] == said[1]["training"]


def test_a_folder_says_what_was_written(student, teacher, prompts, tmp_path):
    watched = []
    train(student, teacher, prompts, tmp_path / "s", watchers=[watched.append], share=(0.0, 1.0), prompt=2)
    said = json.loads((tmp_path / "s" / "student.json").read_text())
    assert said["rollouts"]["share"] == [0.0, 1.0]
    assert said["rollouts"]["prompt"] == 2
    assert said["rollouts"]["prompts"]["rows"] == len(PROMPTS)
    assert said["rollouts"]["teacher"]["digest"] == teacher.identity.digest
    assert said["written"] == dict(watched[-1].rollouts)
    assert said["written"]["texts"] % 2 == 0  # 4, and 2 at an epoch's end
    assert 0 < said["written"]["truncated"] <= said["written"]["texts"] < 12 * 4
    totals = [row.rollouts["tokens"] for row in watched]
    assert totals == sorted(totals)


def test_on_policy_training_comes_closer_to_the_teacher_on_what_the_student_writes(student, teacher, prompts):
    def gap(one):
        rollouts = joined(one, teacher, prompts, batch_size=6, new_tokens=12)
        batches = [batch for step in range(4) for batch, _ in rollouts.batches(one, plan(seed=99), step)]
        with torch.no_grad():
            values = [REVERSE(one.predict(b), teacher(b), b)["soft_targets"][b.mask] for b in batches]
        return float(torch.cat(values).mean())

    before = gap(student)
    trained = train(student, teacher, prompts, steps=40, share=1.0, new_tokens=12)
    assert gap(trained) < 0.5 * before


def test_recorded_and_on_policy_steps_have_their_own_teacher_and_objective(student, teacher, prompts, tmp_path):
    """A recording for the one, a live teacher for the other: forward KL there, sampled reverse KL here."""
    recording = sr.record(teacher, prompts, tmp_path / "r", keep=sr.TopK(8), progress=False)
    watched = []
    with_own = Rollouts(prompts, teacher, SampledReverseKL(), share=0.5, new_tokens=6)
    sr.fit(
        student, recording, prompts, sr.SoftTargets(temperature=1.0), plan=plan(steps=12), rollouts=with_own,
        progress=False, watchers=[watched.append],
    )  # fmt: skip
    assert {tuple(row.terms) for row in watched} == {("soft_targets",), ("sampled_reverse_kl",)}


def test_pairs_that_do_not_belong_together_are_refused(student, teacher, prompts, small_tokenizer, tmp_path):
    recording = sr.record(teacher, prompts, tmp_path / "r", keep=sr.TopK(8), progress=False)
    with pytest.raises(UsageError, match=r"a recording holds the answers to other texts: what the student writes"):
        Rollouts(prompts).joined(student, recording, REVERSE)
    with pytest.raises(UsageError, match=r"there is no teacher: what the student writes is scored live"):
        Rollouts(prompts).joined(student, None, REVERSE)
    with pytest.raises(UsageError, match="rollouts need a student that writes: a causal language model"):
        Rollouts(prompts).joined(sr.Student(torch.nn.Linear(2, 2)), teacher, REVERSE)
    other = type(prompts)(**{**vars(prompts), "tokenizer": "0" * 64})
    with pytest.raises(PairError, match=r"the student's tokenizer is \w{12}, that of the prompts 000000000000"):
        Rollouts(other).joined(student, teacher, REVERSE)
    features = sr.MatchFeatures({"model.layers.0": "model.layers.0"})
    with pytest.raises(
        UsageError, match=r"learns, needs features or couples examples: it is for recorded steps. Give Roll"
    ):
        Rollouts(prompts).joined(student, teacher, sr.Mix({REVERSE: 1.0, features: 1.0}))


def test_a_prompt_that_leaves_no_room_is_refused_by_name(student, teacher, prompts):
    student.net.config.max_position_embeddings = 8
    with pytest.raises(
        DataError, match=r"prompt '0000000\d' has \d+ tokens: with new_tokens=6 it does not fit the stu"
    ):
        joined(student, teacher, prompts).batches(student, plan(), 0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"share": 1.5}, "rollouts.share=1.5 is a share of the steps: choose numbers from 0 to 1"),
        ({"share": (0.0, 2.0)}, r"rollouts.share=\(0.0, 2.0\) is a share"),
        ({"new_tokens": 0}, "rollouts.new_tokens must be above 0, not 0"),
        ({"temperature": 0.0}, "rollouts.temperature must be above 0, not 0.0"),
        ({"top_p": 0.0}, "rollouts.top_p=0.0 is a share of the mass"),
        ({"prompt": "half"}, "rollouts.prompt='half' is unknown: 'whole', 'answer', or a number of tokens"),
        ({"prompt": 0}, "rollouts.prompt=0 is unknown"),
    ],
)
def test_settings_out_of_range_are_refused(prompts, settings, message):
    with pytest.raises(UsageError, match=message):
        Rollouts(prompts, **settings)
