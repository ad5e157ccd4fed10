"""An endpoint as a teacher, against a real llama.cpp server with SmolLM2."""

import json
import math
import os
import socket
import sqlite3
import subprocess
import sys
from pathlib import Path

import jinja2
import pytest
import torch

import stillroom as sr
from endpoint_world import CHOICES, Proxy, asker, colours, llama_server
from stillroom.errors import DataError, EndpointError, SignalError, UsageError
from stillroom.language.prompts import Prompt
from stillroom.teachers.endpoint.journal import Journal, Request
from stillroom.teachers.endpoint.reading import Choice, Label, Text, Tokens
from stillroom.teachers.endpoint.words import first_tokens, spellings


@pytest.fixture(scope="module")
def server():
    with llama_server() as url:
        yield url


def test_classes_from_the_first_token(server, tmp_path):
    """Probabilities of ' red' and ' blue' are those that llama.cpp's own log-probabilities say, renormalised."""
    rows = colours(3)
    with Proxy(server) as proxy:
        teacher = asker(proxy.url, tmp_path)
        said = teacher(rows.batch(range(3)))
        assert said.logits.values.shape == (3, 2)
        torch.testing.assert_close(said.logits.values.exp().sum(-1), torch.ones(3))
        with sqlite3.connect(tmp_path / "journal.sqlite") as db:
            kept = [json.loads(a) for (a,) in db.execute("SELECT answer FROM answers WHERE answer LIKE '%finish%'")]
        for answer in kept:
            top = {text: value for text, _, value in answer["tokens"][0][3]}
            least = min(top.values())
            both = [
                math.log(sum(math.exp(top[form]) for form in spellings(word) if form in top) or math.exp(least))
                for word in CHOICES
            ]
            want = torch.tensor(both).log_softmax(-1)
            assert (said.logits.values - want).abs().sum(-1).min() < 1e-4
        asked = len(proxy.asked)
        again = asker(proxy.url, tmp_path)(rows.batch([2, 0]))
        assert torch.equal(again.logits.values, said.logits.values[[2, 0]])
        assert len(proxy.asked) == asked  # everything was in the journal


def test_recorded_once_and_from_the_journal(server, tmp_path):
    """The recording, the check of its fidelity and a second recording ask for nothing that was answered."""
    rows = colours(6)
    with Proxy(server) as proxy:
        teacher = asker(proxy.url, tmp_path)
        assert teacher.ask_ahead(rows) == {}
        assert len(proxy.questions) == 6
        recording = sr.record(teacher, rows, tmp_path / "recording", batch_size=4, progress=False)
        sr.record(asker(proxy.url, tmp_path), rows, tmp_path / "again", batch_size=4, progress=False)
        assert len(proxy.questions) == 6
        assert proxy.most <= 4  # limits.in_flight
    manifest = json.loads((tmp_path / "recording" / "manifest.json").read_text())
    assert manifest["teacher"]["kind"] == "endpoint"
    assert manifest["teacher"]["name"] == "smollm2"
    assert manifest["teacher"]["source"] == "127.0.0.1"
    assert manifest["teacher"]["classes"] == list(CHOICES)
    assert manifest["fidelity"]["kl"] == 0
    assert torch.equal(recording(rows.batch([1])).logits.values, teacher(rows.batch([1])).logits.values)
    other = asker(server, tmp_path, prompt="Say: {{ text }}")
    with pytest.raises(sr.errors.FolderError, match="template"):
        sr.record(other, rows, tmp_path / "recording", progress=False)


def test_chat_and_the_words_of_classes(server, tmp_path):
    """A chat with a system text; words stand for classes; the template sees columns, classes and words, no label."""
    rows = colours(1, ("warm", "cold"))
    teacher = asker(
        server, tmp_path, route="chat", system="Answer with one word.", classes=("warm", "cold"),
        words={"warm": "Yes", "cold": "No"},
        prompt="{{ text }}? {{ words.warm }} or {{ words['cold'] }} ({{ classes|length }})",
    )  # fmt: skip
    said = teacher(rows.batch([0]))
    assert said.logits.values.exp().sum() == pytest.approx(1)
    with sqlite3.connect(tmp_path / "journal.sqlite") as db:
        asked = [json.loads(r) for (r,) in db.execute("SELECT request FROM answers WHERE request LIKE '%messages%'")]
    assert asked[0]["prompt"]["messages"][1]["content"] == "Thing 0 is blue or red:? Yes or No (2)"
    with pytest.raises(DataError, match=r"'label' is undefined.*text, classes, words"):
        asker(server, tmp_path, prompt="{{ label }}")(rows.batch([0]))


def test_text_and_the_log_probabilities_of_what_was_written(server, tmp_path):
    rows = colours(2)
    text = asker(server, tmp_path, "text", max_tokens=4)(rows.batch([0, 1]))
    assert len(text.text) == 2
    assert all(text.text)
    assert text.logits is None
    said = asker(server, tmp_path, "tokens", max_tokens=4, top=5, vocabulary=49152)(rows.batch([0, 1]))
    assert said.text == text.text
    assert said.logits.ids.shape == (2, 4, 5)
    assert torch.equal(said.logits.ids[..., 0].sort().values, said.logits.ids[..., 0].sort().values)
    mass = said.logits.log_probs.double().exp().sum(-1) + said.logits.rest.double().exp()
    torch.testing.assert_close(mass, torch.ones(2, 4, dtype=torch.float64), rtol=1e-5, atol=1e-5)
    assert said.features["written"].sum() == 8


def test_a_server_that_scores_no_text_says_so(server, tmp_path):
    """llama.cpp ignores echo: nothing is made up."""
    with pytest.raises(SignalError, match="llama.cpp ignores echo"):
        asker(server, tmp_path, "score")(colours(1).batch([0]))


def test_structured_answers(server, tmp_path):
    """JSON by a schema: told to the server, checked here; label and extraction."""
    schema = {"type": "object", "properties": {"label": {"enum": list(CHOICES)}}, "required": ["label"]}
    rows = colours(1)
    teacher = asker(server, tmp_path, "label", route="chat", schema=schema, max_tokens=24)
    said = teacher(rows.batch([0]))
    assert sorted(said.logits.values.exp().tolist()[0]) == [0, 1]
    text = asker(server, tmp_path, "text", route="chat", schema=schema, max_tokens=24)(rows.batch([0])).text[0]
    assert set(json.loads(text)) == {"label"}
    assert json.loads(text)["label"] in CHOICES


def test_invalid_answers_are_asked_again_then_set_aside(server, tmp_path):
    """A bounded number of times, each kept and paid for; in a batch the row is named, ahead it is counted."""
    schema = {"type": "object", "required": ["label"]}
    rows = colours(2)
    with Proxy(server) as proxy:
        teacher = asker(proxy.url, tmp_path, "label", schema=schema, constrain=False, max_tokens=2, attempts=3)
        aside = teacher.ask_ahead(rows)
        assert set(aside) == {"row-0", "row-1"}
        assert "is not JSON" in aside["row-0"]
        assert len(proxy.questions) == 6
        decodings = [body.get("temperature") for _, body, _, _ in proxy.questions]
        assert sorted(decodings) == [0, 0, 0.7, 0.7, 0.7, 0.7]  # a greedy answer would only come again
        assert teacher.ask_ahead(rows) == aside
        assert len(proxy.questions) == 6
        with pytest.raises(SignalError, match="'row-1' has no answer"):
            teacher(rows.batch([1]))


def test_a_question_that_is_refused_is_set_aside(server, tmp_path):
    """400 is about one question: it is not asked again, and the others go on."""
    with Proxy(server, lambda number, body: "400" if "Thing 1 " in body["prompt"] else None) as proxy:
        aside = asker(proxy.url, tmp_path).ask_ahead(colours(3))
        assert list(aside) == ["row-1"]
        assert "this text is not allowed" in aside["row-1"]
        assert len(proxy.questions) == 3
        assert asker(proxy.url, tmp_path).ask_ahead(colours(3)) == aside
        assert len(proxy.questions) == 3


@pytest.mark.parametrize("kind", ["401", "403", "quota"])
def test_refusals_stop_at_once_with_one_line(server, tmp_path, kind, monkeypatch):
    monkeypatch.setenv("CANARY_KEY", "sk-canary-5f1d")
    with (
        Proxy(server, lambda number, body: kind) as proxy,
        pytest.raises(EndpointError, match=r"refuses to answer \(4\d\d: .*Check the key") as failure,
    ):
        asker(proxy.url, tmp_path, key="CANARY_KEY", limits={"in_flight": 2}).ask_ahead(colours(20))
    assert "\n" not in str(failure.value)
    assert len(proxy.questions) <= 2


def test_keys_appear_in_no_file_message_or_log(server, tmp_path, monkeypatch, caplog):
    """Credentials in the address are stripped, the key is sent as a header and written nowhere, also when refused."""
    canary = "sk-canary-77aa10"
    monkeypatch.setenv("CANARY_KEY", canary)
    monkeypatch.setenv("OPENAI_LOG", "debug")
    caplog.set_level("DEBUG")
    with Proxy(server) as proxy:
        url = proxy.url.replace("http://", "http://user:secret-canary@") + "?api-key=query-canary"
        teacher = asker(url, tmp_path, key="CANARY_KEY")
        sr.record(teacher, colours(2), tmp_path / "recording", progress=False)
        assert all(headers["authorization"] == f"Bearer {canary}" for path, _, headers, _ in proxy.questions)
    told = Proxy(server, lambda number, body: "401")
    with told as proxy, pytest.raises(EndpointError) as failure:
        asker(proxy.url, tmp_path / "other", key="CANARY_KEY").ask_ahead(colours(1))
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    for secret in (canary, "secret-canary", "query-canary"):
        assert secret.encode() not in written
        assert secret not in repr(teacher) + str(failure.value) + caplog.text
    for wrong in (canary, "sk_live"):
        with pytest.raises(UsageError, match="never the key itself") as refused:
            asker(server, tmp_path, key=wrong)
        assert wrong not in str(refused.value)
    with pytest.raises(UsageError, match="unencrypted"):
        asker("http://api.example.com/v1", tmp_path, key="CANARY_KEY")
    with pytest.raises(UsageError, match="NO_SUCH_KEY is not set"):
        asker(server, tmp_path / "third", key="NO_SUCH_KEY").ask_ahead(colours(1))


def test_a_key_out_of_a_keyring(server, tmp_path):
    keyring = pytest.importorskip("keyring")

    class Memory(keyring.backend.KeyringBackend):
        priority = 1

        def get_password(self, service, username):
            return {("here", "me"): "ring-canary"}.get((service, username))

        def set_password(self, service, username, password): ...

    before = keyring.get_keyring()
    keyring.set_keyring(Memory())
    try:
        with Proxy(server) as proxy:
            asker(proxy.url, tmp_path, key="keyring:here/me").ask_ahead(colours(1))
            assert proxy.asked[-1][2]["authorization"] == "Bearer ring-canary"
            with pytest.raises(UsageError, match="keyring set there me"):
                asker(proxy.url, tmp_path / "b", key="keyring:there/me").ask_ahead(colours(1))
    finally:
        keyring.set_keyring(before)


def test_two_processes_on_one_journal_share_the_work(server, tmp_path):
    """Neither asks what the other asks, and both end with all answers."""
    script = (
        "import sys, pathlib; sys.path.insert(0, sys.argv[3])\n"
        "from endpoint_world import asker, colours\n"
        "t = asker(sys.argv[1], pathlib.Path(sys.argv[2]), limits={'in_flight': 3})\n"
        "print(len(t.ask_ahead(colours(24))), t(colours(24).batch(range(24))).logits.values.sum().item())\n"
    )
    with Proxy(server) as proxy:
        command = [sys.executable, "-c", script, proxy.url, str(tmp_path), str(Path(__file__).parent)]
        both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ) for _ in range(2)]
        said = [process.communicate()[0] for process in both]
        assert said[0] == said[1]
        assert said[0].startswith("0 ")
        assert len(proxy.questions) == 24
        assert len(proxy.asked) == 24 + 8  # the spellings of two words


# Without a server.


def request(number, **change):
    fields = {
        "server": "s",
        "route": "chat",
        "model": "m",
        "prompt": {"messages": []},
        "decoding": {},
        "sample": number,
    }
    return Request(**{**fields, **change})


def test_a_request_is_known_by_who_what_how_and_which_draw():
    one = request(0)
    assert one.digest == request(0, teacher="another").digest
    others = [request(1), request(0, model="n"), request(0, server="t"), request(0, decoding={"temperature": 1.0})]
    others.append(request(0, prompt={"messages": [{"role": "user", "content": "x"}]}))
    assert len({one.digest, *(other.digest for other in others)}) == 6
    canonical = b'{"decoding":{},"model":"m","prompt":{"messages":[]},"route":"chat","sample":0,"server":"s"}'
    import hashlib

    assert one.digest == hashlib.sha256(canonical).hexdigest()


def test_leases(tmp_path):
    """What one asks nobody else asks, until its lease is over or its process is gone; an answer stays for good."""
    mine, theirs = Journal(tmp_path / "j.sqlite"), Journal(tmp_path / "j.sqlite")
    asked = [request(n) for n in range(4)]
    assert mine.claim(asked, 60, 2) == asked[:2]
    assert theirs.claim(asked, 60, 4) == asked[2:]
    assert mine.claim(asked, 60, 4) == []
    mine.settle(asked[0], {"text": "first", "id": "a", "input_tokens": 3}, 0.5)
    mine.settle(asked[0], {"text": "second"}, 0.5)
    assert theirs.answers([one.digest for one in asked]) == {
        asked[0].digest: {"text": "first", "id": "a", "input_tokens": 3}
    }
    assert theirs.knows("a", asked[1].digest)
    assert not theirs.knows("a", asked[0].digest)
    mine.release([asked[0], asked[1]])  # the answered one stays
    assert theirs.claim(asked, 60, 4) == [asked[1]]
    assert mine.totals("") == theirs.totals("")
    assert mine.totals("").input_tokens == 3
    theirs.renew(asked[1].digest, -1)
    assert mine.claim(asked, 60, 4) == [asked[1]]
    mine.close()
    theirs.close()
    gone = subprocess.Popen(["true"])
    gone.wait()
    left, now = Journal(tmp_path / "j.sqlite"), Journal(tmp_path / "j.sqlite")
    left.owner = f"{socket.gethostname()}/{gone.pid}/1/x"
    assert left.claim([request(9)], 3600, 1)
    assert now.claim([request(9)], 60, 1)  # its process is gone
    left.close()
    now.close()


def test_a_file_that_is_no_journal_is_refused(tmp_path):
    (tmp_path / "j.sqlite").write_text("no database, but long enough to be looked at as one")
    with pytest.raises(sr.errors.FolderError, match="cannot be used as a journal"):
        Journal(tmp_path / "j.sqlite")
    assert (tmp_path / "j.sqlite").read_text().startswith("no database")


def test_templates_stay_in_their_sandbox():
    batch = colours(1).batch([0])
    for source in ("{{ text.__class__.__mro__ }}", "{{ ''.__class__.__base__.__subclasses__() }}"):
        with pytest.raises((UsageError, DataError)):
            Prompt(source).fill(batch, 0, {})
    with pytest.raises(UsageError, match="no Jinja2 template"):
        Prompt("{{ text")
    assert jinja2.__version__
    assert Prompt("{{ text[:5]|upper }}", "s").fill(batch, 0, {}) == [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "THING"},
    ]


def said(*top, text="x", finish="stop"):
    listed = [[name, number, value] for number, (name, value) in enumerate(top)]
    return {"text": text, "finish": finish, "tokens": [[*listed[0], listed]] if top else []}


def test_first_tokens_by_hand():
    """p(A) = .5 + .1 of .8 on the classes; a class that is not listed gets what the least likely listed token has."""
    pieces = first_tokens(("A", "B"), {})
    reading = Choice(("A", "B"), pieces=pieces)
    top = [("A", math.log(0.5)), ("B", math.log(0.2)), (" A", math.log(0.1)), ("I", math.log(0.05))]
    (row,) = reading.signal([[said(*top)]]).logits.values.exp()
    torch.testing.assert_close(row, torch.tensor([0.75, 0.25]))
    (row,) = reading.signal([[said(top[0], top[3])]]).logits.values.exp()
    torch.testing.assert_close(row, torch.tensor([0.5 / 0.55, 0.05 / 0.55]))
    leaning = Choice(("A", "B"), prior=(0.75, 0.25), pieces=pieces)  # what it leans to, divided out: nothing is left
    torch.testing.assert_close(leaning.signal([[said(*top)]]).logits.values.exp(), torch.tensor([[0.5, 0.5]]))
    with pytest.raises(UsageError, match=r"prior=\[1.0\]: give each of 2 classes a number above 0"):
        Choice(("A", "B"), prior=(1.0,))
    assert reading.problem(said(("The", -0.1))).startswith("0.00% of the probability")
    with pytest.raises(SignalError, match="no top_logprobs"):
        reading.need(said(), "a server")


def test_words_whose_first_tokens_collide_are_refused():
    told = {form: [form[:-3], form[-3:]] for word in ("interest", "internal") for form in spellings(word)}
    told |= {" interest": [" inter", "est"], " internal": [" inter", "nal"]}
    with pytest.raises(UsageError, match="'interest' and 'internal' both begin with the token ' Inter'"):
        first_tokens(("interest", "internal"), told)
    assert first_tokens(("interest", "internal"), {})  # a server that does not say: only whole words count
    with pytest.raises(UsageError, match="two classes or more"):
        Choice(("same", "Same "))


def test_labels_by_hand():
    """Shares of draws; another word, or JSON that does not satisfy its schema, is no answer."""
    reading = Label(("red", "blue"))
    draws = [said(text=t) for t in ("Red", "blue.", " RED ", "red")]
    torch.testing.assert_close(reading.signal([draws]).logits.values.exp(), torch.tensor([[0.75, 0.25]]))
    assert reading.problem(said(text="reddish")) == "'reddish' is none of red, blue"
    schema = {"type": "object", "properties": {"label": {"type": "string"}}, "required": ["label"]}
    reading = Label(("red", "blue"), schema)
    assert reading.problem(said(text='```json\n{"label": "red"}\n```')) is None
    assert reading.problem(said(text='Sure! {"label": "red"}')).endswith("is not JSON")
    assert "required property" in reading.problem(said(text="{}"))
    assert reading.problem(said(text='{"label": "green"}')) == "'green' is none of red, blue"
    assert reading.decoding()["response_format"]["json_schema"]["schema"] == schema
    assert Text().problem(said(text=" \n")) == "it is empty"
    assert Text({"type": "array"}).signal([[said(text="[1,\n2]")]]).text == ("[1, 2]",)
    with pytest.raises(UsageError, match="no JSON Schema"):
        Text({"type": "nothing"})


def test_written_tokens_by_hand():
    reading = Tokens(vocabulary=10, length=2, top=3)
    answer = said(("a", math.log(0.5)), ("b", math.log(0.25)))
    signal = reading.signal([[answer]])
    assert signal.logits.ids[0, 0].tolist() == [0, 1, 0]
    torch.testing.assert_close(signal.logits.log_probs[0, 0].exp(), torch.tensor([0.5, 0.25, 0.0]))
    assert signal.logits.rest[0, 0].exp() == pytest.approx(0.25)
    torch.testing.assert_close(signal.logits.log_probs[0, 1].exp(), torch.full((3,), 0.1))
    assert signal.logits.rest[0, 1].exp() == pytest.approx(0.7)
    assert reading.problem({**answer, "tokens": [["z", 11, 0.0, [["z", 11, 0.0]]]]}) == "token 11 of a vocabulary of 10"
    with pytest.raises(SignalError, match="names tokens by their text"):
        reading.need({**answer, "tokens": [["z", None, 0.0, [["z", None, 0.0]]]]}, "it")


def test_settings_that_do_not_fit_are_refused(tmp_path):
    def make(**settings):
        return asker("http://localhost:1/v1", tmp_path, **settings)

    with pytest.raises(UsageError, match="did you mean 'choice'"):
        make(reads="choicee")
    with pytest.raises(UsageError, match="limits has no 'in_fligth'; did you mean 'in_flight'"):
        make(limits={"in_fligth": 1})
    with pytest.raises(UsageError, match="words has none for blue"):
        make(words={"red": "A"})
    with pytest.raises(UsageError, match="no class; did you mean 'red'"):
        make(words={"redd": "A", "blue": "B"})
    with pytest.raises(UsageError, match="draws"):
        make(samples=3)
    with pytest.raises(UsageError, match="needs vocabulary"):
        make(reads="tokens")
    with pytest.raises(UsageError, match="no address"):
        asker("localhost:8000/v1", tmp_path)
