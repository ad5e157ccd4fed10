"""A student over HTTP: typed questions, answers of the student itself, batches, limits, and a clean end."""

import asyncio
import dataclasses
import threading

import httpx
import pytest
import torch

import stillroom as sr
from served import running, taken
from stillroom.cli import main
from stillroom.errors import DataError, MissingFileError, UsageError
from stillroom.serving.app import Serving, build_app
from stillroom.serving.batching import Batcher
from stillroom.serving.opening import open_serving
from stillroom.serving.questions import Raw, question_model, raw_columns
from stillroom.students.networks import save_student
from stillroom.students.words import Words

POINTS = sr.Table(
    {"x": torch.rand(64, 3), "unused": torch.rand(64)}, ids=tuple(map(str, range(64))), classes=("a", "b")
)
NET = sr.Student.make("stillroom.students.architectures:mlp", {"inputs": 3, "outputs": 2}, classes=("a", "b"))


def serving(**changes) -> Serving:
    columns = raw_columns(NET.adapter, POINTS.batch([0]))
    return dataclasses.replace(Serving("points", NET.predict, columns, NET.classes), **changes)


@pytest.fixture(scope="module")
def server():
    with running(build_app(serving())) as one:
        yield one


def test_an_answer_is_the_student_s(server):
    row = POINTS.columns["x"][0]
    said = httpx.post(f"{server.address}/predict", json={"inputs": {"x": row.tolist()}})
    expected = NET.predict({"x": row[None]}).logits.values.softmax(-1)[0]
    assert said.status_code == 200
    assert said.json()["label"] == "ab"[expected.argmax()]
    assert said.json()["probabilities"] == pytest.approx({"a": float(expected[0]), "b": float(expected[1])}, abs=1e-6)
    assert said.json()["confidence"] == max(said.json()["probabilities"].values())


def test_questions_that_come_together_are_answered_together_and_each_its_own(server):
    """200 at once: every answer is the one of its own question, and fewer batches than questions were run."""

    async def ask_all():
        async with httpx.AsyncClient(limits=httpx.Limits(max_connections=50), timeout=60) as client:
            rows = [POINTS.columns["x"][n % 64].tolist() for n in range(200)]
            return await asyncio.gather(
                *(client.post(f"{server.address}/predict", json={"inputs": {"x": row}}) for row in rows)
            )

    before = counted(server, "stillroom_batch_size_count")
    found = asyncio.run(ask_all())
    expected = NET.predict({"x": POINTS.columns["x"]}).logits.values.softmax(-1)
    for number, one in enumerate(found):
        assert one.json()["probabilities"]["a"] == pytest.approx(float(expected[number % 64][0]), abs=1e-6)
    assert counted(server, "stillroom_batch_size_count") - before < 150


def counted(server, name):
    lines = httpx.get(f"{server.address}/metrics").text.splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith((f"{name} ", f"{name}{{")))


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ('{"inputs": {"x": [1, 2]}}', "inputs.x: List should have at least 3 items after validation, not 2"),
        ('{"inputs": {"x": [1, 2, 3, 4]}}', "inputs.x: List should have at most 3 items"),
        ('{"inputs": {"x": [1, 2, "3"]}}', "inputs.x.2: Input should be a valid number"),
        ('{"inputs": {"x": [1, 2, true]}}', "inputs.x.2: Input should be a valid number"),
        ('{"inputs": {"x": [1, 2, NaN]}}', "inputs.x.2: Input should be a finite number"),
        ('{"inputs": {"x": [1, 2, 1e999]}}', "inputs.x.2: Input should be a finite number"),
        ('{"inputs": {"x": [1, 2, 3], "y": 1}}', "inputs.y: Extra inputs are not permitted"),
        ('{"inputs": {}}', "inputs.x: Field required"),
        ("{}", "inputs: Field required"),
        ("[]", "Input should be a valid dictionary"),
        ('{"inputs": {', "JSON decode error"),
        ("", "Field required"),
    ],
)
def test_what_is_no_question_is_422_with_one_line(server, body, says):
    said = httpx.post(f"{server.address}/predict", content=body, headers={"content-type": "application/json"})
    assert said.status_code == 422
    assert says in said.json()["error"]


def test_other_paths_methods_and_sizes(server):
    post = f"{server.address}/predict"
    assert httpx.get(f"{server.address}/nowhere").status_code == 404
    assert httpx.get(post).status_code == 405
    large = b'{"inputs": {"x": [' + b"1," * (3 << 20)
    assert httpx.post(post, content=large).status_code == 413
    assert httpx.post(post, content=(large[n : n + 65536] for n in range(0, len(large), 65536))).status_code == 413
    # strangers' paths share one name in the metrics
    assert 'path="other"' in httpx.get(f"{server.address}/metrics").text
    assert "nowhere" not in httpx.get(f"{server.address}/metrics").text


def test_what_it_says_of_itself(server):
    """/health names the model; the example of the OpenAPI document can be asked; /docs needs nobody."""
    schema = httpx.get(f"{server.address}/openapi.json").json()
    (example,) = schema["components"]["schemas"]["Question"]["examples"]
    assert set(example["inputs"]) == {"x"}  # the column that the student does not read is not asked for
    assert httpx.post(f"{server.address}/predict", json=example).status_code == 200
    assert {"200", "413", "422", "503"} <= set(schema["paths"]["/predict"]["post"]["responses"])
    assert httpx.get(f"{server.address}/health").json()["status"] == "ok"
    page = httpx.get(server.address, follow_redirects=True)
    assert page.url.path == "/docs"
    assert "list of 3 (number)" in page.text
    assert not [part for part in page.text.split('"') if part.startswith(("http:", "https:", "//"))]
    assert 'stillroom_answers_total{by="student"}' in httpx.get(f"{server.address}/metrics").text


class Held:
    """A model that answers when it is let, and fails on what is below 0."""

    def __init__(self):
        self.free, self.asked = threading.Event(), threading.Event()

    def __call__(self, batch):
        self.asked.set()
        assert self.free.wait(60)
        if (batch.inputs["x"] < 0).any():
            raise RuntimeError("secret of the inside")
        return NET.predict(batch)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_question_that_fails_takes_no_other_with_it():
    """Asked together, only the bad one is 500, and the client is not told what is inside."""
    held = Held()
    with running(build_app(serving(model=held, wait=0.0))) as server:
        answers = [[1.0, 2.0, 3.0], [-1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]
        first = asked_in_thread(server, [0.5, 0.5, 0.5])
        assert held.asked.wait(60)
        others = [asked_in_thread(server, row) for row in answers]
        while counted(server, "stillroom_open_requests") < 5:  # the four, and the one that counts
            pass
        held.free.set()
        found = [one() for one in (first, *others)]
    assert [one.status_code for one in found] == [200, 200, 500, 200]
    assert "secret" not in found[2].text


def test_beyond_the_limit_it_says_come_again_and_a_clean_end_answers_all():
    """Two may be open: a third is 503 with Retry-After. Told to end, it answers both, then takes no connection."""
    held = Held()
    with running(build_app(serving(model=held, open_requests=2))) as server:
        inside = [asked_in_thread(server, [0.1, 0.2, 0.3]) for _ in range(2)]
        while counted(server, "stillroom_open_requests") < 3:
            pass
        third = httpx.post(f"{server.address}/predict", json={"inputs": {"x": [1, 2, 3]}})
        assert (third.status_code, third.headers["retry-after"]) == (503, "1")
        assert "come again" in third.json()["error"]
        assert httpx.get(f"{server.address}/health").status_code == 200
        server.server.should_exit = True
        held.free.set()
        assert [one().status_code for one in inside] == [200, 200]
        server.end()
    assert not taken(server.address)


def asked_in_thread(server, row):
    """Starts a question; calling what it returns waits for the answer."""
    found = []

    def ask():
        found.append(httpx.post(f"{server.address}/predict", json={"inputs": {"x": row}}, timeout=60))

    thread = threading.Thread(target=ask)
    thread.start()

    def answer():
        thread.join(60)
        return found[0]

    return answer


def test_who_hung_up_is_not_answered_and_the_rest_are():
    """A cancelled question is skipped; closing answers what waits."""

    async def play():
        asked = []
        batcher = Batcher(lambda rows: [asked.append(row) or row * 2 for row in rows], most=2, wait=0.0)
        gone = asyncio.ensure_future(batcher.ask(1))
        await asyncio.sleep(0)
        gone.cancel()
        kept = [asyncio.ensure_future(batcher.ask(n)) for n in range(2, 20)]
        await asyncio.sleep(0)
        await batcher.close()
        return asked, [one.result() for one in kept]

    asked, found = asyncio.run(play())
    assert 1 not in asked
    assert found == [2 * n for n in range(2, 20)]


def test_columns_of_any_kind():
    """Whole numbers, tables of numbers, texts; an adapter without an example says what it can."""
    batch = sr.Batch(("1",), {"n": torch.tensor([3]), "grid": torch.zeros(1, 2, 2), "text": ("hello",)})

    def all_of_them(inputs):
        return tuple(inputs[name] for name in ("n", "grid", "text"))

    columns = raw_columns(all_of_them, batch)
    assert [(c.name, c.dtype, c.shape) for c in columns] == [
        ("n", torch.int64, ()),
        ("grid", torch.float32, (2, 2)),
        ("text", None, None),
    ]
    with pytest.raises(ValueError, match="valid integer"):
        question_model(columns).model_validate({"inputs": {"n": 1.5, "grid": [[0, 0], [0, 0]], "text": "x"}})
    assert raw_columns(Words(("a",)), None) == (Raw("text", None),)
    with pytest.raises(DataError, match="does not say which columns it reads"):
        raw_columns(all_of_them, None)


def test_a_folder_is_opened_as_it_is(tmp_path):
    """A student's folder without a recipe; an export instead of the student; what is not there is said."""
    words = Words(("wheat", "gold"))
    made = sr.Student.make(
        "stillroom.students.architectures:bag_of_words",
        {"vocabulary": words.size, "classes": 2},
        adapter=words,
        classes=("grain", "metal"),
    )
    save_student(made, tmp_path / "run" / "student")
    opened = open_serving(tmp_path / "run")
    assert opened.columns == (Raw("text", None),)
    with running(build_app(opened)) as server:
        said = httpx.post(f"{server.address}/predict", json={"inputs": {"text": "wheat rose"}}).json()
    expected = made.predict({"text": ("wheat rose",)}).logits.values.softmax(-1)[0]
    assert said["probabilities"]["grain"] == pytest.approx(float(expected[0]), abs=1e-6)

    rows = sr.Table({"text": ("wheat gold", "gold", "x")}, ids=("1", "2", "3"), classes=("grain", "metal"))
    sr.export(made, rows, tmp_path / "run" / "exports", target="onnx", precision="fp32", progress=False)
    shipped = open_serving(tmp_path / "run", "exports/onnx-fp32")
    assert shipped.answers([{"text": "gold"}])[0].probabilities == pytest.approx(
        opened.answers([{"text": "gold"}])[0].probabilities, abs=1e-4
    )
    with pytest.raises(MissingFileError, match="no artefact exports/onnx-int8; .* has exports/onnx-fp32"):
        open_serving(tmp_path / "run", "exports/onnx-int8")
    with pytest.raises(MissingFileError, match="holds no student"):
        open_serving(tmp_path)


def test_a_port_that_is_taken_is_said_in_one_line(server, tmp_path, capsys):
    save_student(NET, tmp_path / "student")
    with pytest.raises(SystemExit) as ended:
        main(["serve", str(tmp_path), "--port", server.address.rpartition(":")[2]])
    assert ended.value.code == UsageError.exit_code
    assert "cannot be served at (Address already in use). Choose another --port." in capsys.readouterr().err
