"""A server that scores and one that writes. Scoring: a real HTTP server here, in the form that vLLM documents, with the
numbers of a real (small) model. Writing: llama.cpp itself, with that model exported as GGUF.
"""

import http.server
import json
import threading
from contextlib import contextmanager

import pytest
import torch

import stillroom as sr
from stillroom.data import pack
from stillroom.divergences import reverse_kl
from stillroom.errors import DataError, PairError, SignalError, UsageError
from stillroom.language import next_token, tokenizer_digest
from stillroom.objectives.on_policy import SampledReverseKL
from stillroom.plan import Plan
from stillroom.rollouts import Rollouts
from stillroom.students import causal
from stillroom.teachers.causal import from_causal
from stillroom.teachers.completions import Completions

TEXTS = ["the cat sat on the mat", "a dog ran", "it is and it was"]


@pytest.fixture(scope="module")
def net(small_tokenizer):
    return causal.fresh(small_tokenizer, hidden=32, layers=2, heads=2, seed=3).net.eval()


@pytest.fixture(scope="module")
def rows(small_tokenizer):
    return pack(TEXTS, small_tokenizer, 24)


def answer(net, body, form):
    """What vLLM's /v1/completions gives for one prompt of ids, from the model's own log-probabilities."""
    ids = torch.tensor(body["prompt"])[None]
    with torch.no_grad():
        found = next_token(net, ids, torch.arange(ids.shape[1])[None]).compute().float().log_softmax(-1)[0]
    places = [None]
    for before, token in zip(found, body["prompt"][1:]):
        top = before.topk(min(body["logprobs"], len(before)))
        place = dict(zip(top.indices.tolist(), top.values.tolist()))
        places.append(place | {token: float(before[token])})
    if form == "native":
        said = [place and {str(t): {"logprob": v, "rank": 1, "decoded_token": "?"} for t, v in place.items()}
                for place in places]  # fmt: skip
        return {"text": "", "logprobs": None, "prompt_logprobs": said}
    if form == "silent":
        return {"text": "", "logprobs": {"content": []}}
    name = (lambda t: f"token_id:{t}") if form == "echo" else (lambda t: f"word {t}")
    tops = [place and {name(t): v for t, v in place.items()} for place in places]
    return {"text": "", "logprobs": {"top_logprobs": [*tops, {name(0): -0.1}]}}  # the last: of what it had to write


@contextmanager
def served(net, form="native", change=lambda choice: choice, busy=0):
    """The address of a server that runs for a moment; ``busy``: so many requests are told to come again."""
    state = {"busy": busy, "asked": []}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            state["asked"].append((self.path, body, dict(self.headers)))
            status, said = 200, {"choices": [change(answer(net, body, form))]} if form != "odd" else {"error": "no"}
            if state["busy"] > 0 or form == "refuses":
                state["busy"] -= 1
                status, said = (503, {"error": "busy"}) if form != "refuses" else (400, {"error": "prompt_logprobs"})
            content = json.dumps(said).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def scorer(url, net, **settings):
    return Completions(url, "small", **{"vocabulary": net.config.vocab_size, "keep": 5, **settings})


@pytest.mark.parametrize("form", ["native", "echo"])
def test_a_server_says_what_the_model_itself_says(net, rows, form):
    """ms-swift#9671 (0.239 from the server, 0.032 locally), ms-swift#8436 (one off): packed documents, both forms."""
    batch = rows.batch(range(len(rows)))
    with torch.no_grad():
        local = next_token(net, batch.inputs["tokens"], batch.inputs["positions"]).compute().log_softmax(-1)
    with served(net, form) as (url, state):
        said = scorer(url, net)(batch).need_logits()
        whole = scorer(url, net, keep=net.config.vocab_size)(batch).need_logits()
    where = batch.mask
    torch.testing.assert_close(said.log_probs[where], local.gather(-1, said.ids)[where], atol=1e-4, rtol=1e-4)
    mass = said.log_probs.exp().sum(-1) + said.rest.exp()
    torch.testing.assert_close(mass, torch.ones_like(mass))
    assert torch.equal(said.ids[..., 0][where], batch.labels[where])
    assert all(len(set(kept)) == 5 for kept in said.ids.flatten(0, 1).tolist())
    student = torch.randn(*batch.labels.shape, net.config.vocab_size, generator=torch.Generator().manual_seed(0))
    ours = [reverse_kl(student[where], teacher[where]) for teacher in (whole, sr.Dense(local))]
    torch.testing.assert_close(*ours, atol=1e-3, rtol=1e-4)
    assert len(state["asked"]) == 2 * len(TEXTS)  # one request for a document, none for padding
    assert state["asked"][0][1]["return_tokens_as_token_ids"] is True


def test_a_server_teaches_on_policy_and_is_a_teacher_to_record(net, rows, small_tokenizer, tmp_path):
    """The sampled reverse KL finds every written token among the kept: value and step are those of the live teacher."""
    student = causal.fresh(small_tokenizer, hidden=16, layers=1, heads=2)
    digest = tokenizer_digest(small_tokenizer)
    prompts = pack(TEXTS, small_tokenizer, 24, together=False)
    live = from_causal(net, small_tokenizer)
    found = []
    with served(net) as (url, _):
        server = scorer(url, net, tokenizer=digest)
        for teacher in (server, live):
            rollouts = Rollouts(prompts, teacher, SampledReverseKL(), new_tokens=6)
            watched = []
            plan = Plan(steps=3, batch_size=3, learning_rate=0.1, optimiser="sgd")
            sr.fit(student, None, prompts, sr.HardLabels(), plan=plan, rollouts=rollouts, watchers=[watched.append],
                   progress=False)  # fmt: skip
            found.append([row.loss for row in watched])
        recording = sr.record(server, rows, tmp_path / "r", keep=sr.TopK(5), progress=False)
    assert found[0] == pytest.approx(found[1], abs=1e-3)
    assert recording(rows.batch([0])).need_logits().ids.shape[-1] == 5
    with pytest.raises(PairError, match=r"the student's tokenizer is \w{12}, that of the teacher 111111111111"):
        Rollouts(prompts, scorer(url, net, tokenizer="1" * 64)).joined(student, None, sr.HardLabels())


def test_a_busy_server_is_asked_again_and_the_key_is_sent(net, rows, monkeypatch):
    monkeypatch.setattr("stillroom.teachers.completions.time.sleep", lambda _: None)
    monkeypatch.setenv("SERVER_KEY", "secret")
    with served(net, busy=2) as (url, state):
        teacher = scorer(url, net, together=1, key="SERVER_KEY")
        teacher(rows.batch([0]))
    assert len(state["asked"]) == len(TEXTS) + 2
    assert state["asked"][0][0] == "/v1/completions"
    assert state["asked"][0][2]["Authorization"] == "Bearer secret"
    assert url not in repr(teacher)
    assert "SERVER_KEY" not in repr(teacher)


def one_off(choice):
    return {**choice, "prompt_logprobs": [None, *choice["prompt_logprobs"][:-1]]}


def at_half_temperature(choice):
    places = [place and {t: {"logprob": v["logprob"] / 2} for t, v in place.items()}
              for place in choice["prompt_logprobs"]]  # fmt: skip
    return {**choice, "prompt_logprobs": places}


@pytest.mark.parametrize(
    ("form", "settings", "change", "message"),
    [
        ("silent", {}, None, r"says nothing of how likely the prompt's tokens are .* llama.cpp and hosted APIs never"),
        ("words", {}, None, r"names tokens by their text \('word \d+'\), which is not unique"),
        ("refuses", {}, None, r"does not answer \(status 400: .*prompt_logprobs.*\). Check the address, model and key"),
        ("odd", {}, None, r"answered, but not in the form of /v1/completions: \{\"error\": \"no\"\}"),
        ("native", {}, one_off, r"scored other tokens than were sent: at place \d+ of \d+ it says nothing of id \d+"),
        ("native", {"keep": 40}, at_half_temperature, r"gives probabilities that sum to \d+\.\d+, ids up to \d+ of"),
        ("native", {"vocabulary": 50}, None, r"ids up to \d+ of a vocabulary of 50"),
    ],
)  # fmt: skip
def test_a_server_that_cannot_teach_is_refused(net, rows, form, settings, change, message):
    served_so = served(net, form, change or (lambda choice: choice))
    with served_so as (url, _), pytest.raises(SignalError, match=message):
        scorer(url, net, **settings)(rows.batch([0]))


def test_a_server_that_gives_fewer_than_are_kept_is_refused(net, rows):
    def fewer(choice):
        places = [place and dict(list(place.items())[-3:]) for place in choice["prompt_logprobs"]]
        return {**choice, "prompt_logprobs": places}

    message = r"gives 3 log-probabilities a place, and keep=5. Keep fewer, or let"
    with served(net, change=fewer) as (url, _), pytest.raises(SignalError, match=message):
        scorer(url, net)(rows.batch([0]))


def test_no_server_at_all(net, rows, monkeypatch):
    monkeypatch.setattr("stillroom.teachers.completions.time.sleep", lambda _: None)
    with pytest.raises(SignalError, match=r"http://127.0.0.1:9/v1/completions does not answer \(.*refused"):
        scorer("http://127.0.0.1:9", net)(rows.batch([0]))


def test_labels_that_are_not_the_text_are_refused(net, rows):
    batch = rows.batch([0])
    other = sr.Batch(batch.ids, batch.inputs, batch.labels.roll(1, 1), batch.mask, extra=batch.extra)
    with pytest.raises(DataError, match=r"example '.*' has labels that are not its next tokens"):
        scorer("http://127.0.0.1:9", net)(other)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"keep": 0}, "keep=0 of a vocabulary of 329: choose from 1 to all of it"),
        ({"together": 0}, "together=0 and tries=4 must be 1 or more"),
    ],
)
def test_settings_out_of_range_are_refused(net, settings, message):
    with pytest.raises(UsageError, match=message):
        scorer("http://127.0.0.1:9", net, **settings)


@pytest.fixture(scope="module")
def llama(net, small_tokenizer, tmp_path_factory):
    """llama.cpp's own server with the small model, float32."""
    xllamacpp = pytest.importorskip("xllamacpp")
    from stillroom.exporting.gguf import writing as gguf

    path = tmp_path_factory.mktemp("gguf") / "small"
    made = gguf.write(causal.from_causal(net, small_tokenizer), (), (), path)
    parameters = xllamacpp.CommonParams()
    parameters.model.path, parameters.n_ctx, parameters.n_parallel = str(made.path), 256, 1
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = 1
    parameters.warmup = parameters.fit_params = parameters.ui = False
    parameters.n_threads_http, parameters.verbosity, parameters.port = 1, -1, 0
    server = xllamacpp.Server(parameters)
    yield server
    del server


def test_llama_cpp_writes_rollouts(llama, net, small_tokenizer):
    """Its tokens and its log-probabilities are the model's own; its end mark is among the tokens."""
    writer = Completions(llama.listening_address, "small", net.config.vocab_size, together=1)
    student = causal.from_causal(net, small_tokenizer)
    prompts = pack(TEXTS, small_tokenizer, 24, together=False)
    rollouts = Rollouts(prompts, writer=writer, new_tokens=8).joined(
        student, from_causal(net, small_tokenizer), SampledReverseKL()
    )
    ((batch, _),) = rollouts.batches(student, Plan(batch_size=3), 0)
    ((again, _),) = rollouts.batches(student, Plan(batch_size=3), 0)
    ((other, _),) = rollouts.batches(student, Plan(batch_size=3), 1)
    assert torch.equal(batch.labels, again.labels)
    assert batch.labels.tolist() != other.labels.tolist()
    with torch.no_grad():
        log_q = next_token(net, batch.inputs["tokens"], batch.inputs["positions"]).compute().log_softmax(-1)
    said = log_q.gather(-1, batch.labels.clamp(min=0)[..., None]).squeeze(-1)[batch.mask]
    torch.testing.assert_close(batch.extra["behaviour"][batch.mask], said, atol=2e-3, rtol=1e-3)
    hidden = batch.extra["written"] & ~batch.mask  # tokens that end within a character
    assert 0 < int(hidden.sum()) < int(batch.mask.sum())


def test_llama_cpp_is_refused_as_a_scorer(llama, net, rows):
    """Its echo does not give the prompt's log-probabilities."""
    with pytest.raises(SignalError, match="says nothing of how likely the prompt's tokens are"):
        scorer(llama.listening_address, net)(rows.batch([0]))


def test_a_server_writes_at_temperature_1_only():
    writer = Completions("http://127.0.0.1:9", "small", 10, keep=1)
    with pytest.raises(UsageError, match=r"a server writes at temperature 1 and top_p 1, not 0.5 and 1.0"):
        writer.write([[1]], [0], new_tokens=4, ends=[2], temperature=0.5, top_p=1.0)


def test_answers_that_are_no_rollout_are_refused():
    from stillroom.teachers.completions import _written

    vllm = {"logprobs": {"tokens": ["token_id:5", "token_id:2", "token_id:7"], "token_logprobs": [-1, -2, -3]}}
    assert _written(vllm, {2}, "url").tokens == (5, 2)
    content = [{"id": 5, "logprob": -1.0}, {"id": 6, "logprob": -2.0}, {"id": 2, "logprob": -3.0}]
    found = _written({"logprobs": {"content": content}, "all_tokens": [5, 9, 6]}, {2}, "url")
    assert found.tokens == (5, 9, 6, 2)
    assert str(found.log_probs) == "(-1.0, nan, -2.0, -3.0)"
    with pytest.raises(SignalError, match="url wrote, but gives no ids and log-probabilities of what it wrote"):
        _written({"text": "the cat"}, {2}, "url")
    with pytest.raises(SignalError, match="url wrote nothing, not even an end mark"):
        _written({"logprobs": {"content": []}}, {2}, "url")
