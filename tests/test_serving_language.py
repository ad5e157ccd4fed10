"""A language model behind OpenAI's routes, asked by OpenAI's own client: the student's own texts, streamed or whole."""

import asyncio

import httpx
import openai
import pytest
import torch

from language_fakes import student
from served import running
from stillroom.language.writing import write
from stillroom.serving.language import LanguageServing, build_language_app
from stillroom.serving.opening import is_language, open_language
from stillroom.serving.writer import Pieces, Writer
from stillroom.students.networks import save_student


@pytest.fixture(scope="module")
def made():
    one = student(seed=3)
    with torch.no_grad():  # a random network is nearly uniform: its likeliest token would hang on the last digit
        one.net.get_output_embeddings().weight.mul_(20)
    return one


@pytest.fixture(scope="module")
def server(made):
    with running(build_language_app(LanguageServing("small", Writer(made.net, made.tokenizer), {}))) as one:
        yield one


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=f"{server.address}/v1", api_key="none", max_retries=0, timeout=60) as one:
        yield one


def greedy(made, prompt, count):
    """The likeliest tokens by hand: one forward pass for each."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            ids.append(int(made.net.eval()(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def test_the_likeliest_text_is_the_student_s_own(made, client):
    """temperature 0: token for token what the network's own forward passes give."""
    prompt = Writer(made.net, made.tokenizer).prompt("the cat")
    expected = greedy(made, prompt, 12)
    said = client.completions.create(model="small", prompt="the cat", temperature=0, max_tokens=12)
    assert said.choices[0].text == made.tokenizer.decode(expected, skip_special_tokens=True)
    assert said.choices[0].finish_reason == "length"
    assert (said.usage.prompt_tokens, said.usage.completion_tokens) == (len(prompt), 12)
    ids = client.completions.create(model="small", prompt=list(prompt), temperature=0, max_tokens=12)
    assert ids.choices[0].text == said.choices[0].text


def test_a_conversation_is_rendered_by_the_template(made, client):
    messages = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "the dog"}]
    said = client.chat.completions.create(model="small", messages=messages, temperature=0, max_tokens=8)
    text = made.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    prompt = made.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert said.choices[0].message.content == made.tokenizer.decode(greedy(made, prompt, 8), skip_special_tokens=True)
    assert said.choices[0].message.role == "assistant"
    parts = [*messages[:1], {"role": "user", "content": [{"type": "text", "text": "the dog"}]}]
    again = client.chat.completions.create(model="small", messages=parts, temperature=0, max_completion_tokens=8)
    assert again.choices[0].message.content == said.choices[0].message.content


def test_a_stream_is_the_same_text_piece_by_piece(client):
    """Pieces come as they are written and add up to the whole text; the last tells why, and the usage where asked."""
    ask = {"model": "small", "prompt": "the bird", "seed": 5, "max_tokens": 24}
    whole = client.completions.create(**ask)
    events = list(client.completions.create(**ask, stream=True, stream_options={"include_usage": True}))
    pieces = [event.choices[0].text for event in events if event.choices]
    assert "".join(pieces) == whole.choices[0].text
    assert len([piece for piece in pieces if piece]) > 3
    assert events[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert events[-1].usage.completion_tokens == whole.usage.completion_tokens
    chat = {"model": "small", "messages": [{"role": "user", "content": "it"}], "seed": 5, "max_tokens": 9}
    whole = client.chat.completions.create(**chat).choices[0].message.content
    assert "".join(e.choices[0].delta.content for e in client.chat.completions.create(**chat, stream=True)) == whole


def test_a_text_does_not_depend_on_who_else_asks(server, client):
    """Forty at once, of different seeds, lengths and temperatures: each is what it is alone."""
    asks = [
        {"prompt": f"the {n}", "seed": n, "max_tokens": 1 + n % 13, "temperature": (0.0, 0.7, 1.0)[n % 3]}
        for n in range(40)
    ]
    alone = [client.completions.create(model="small", **ask).choices[0].text for ask in asks]

    async def together():
        async with openai.AsyncOpenAI(base_url=f"{server.address}/v1", api_key="none", timeout=60) as many:
            return await asyncio.gather(*(many.completions.create(model="small", **ask) for ask in asks))

    assert [one.choices[0].text for one in asyncio.run(together())] == alone
    several = client.completions.create(model="small", prompt=["the 0", "the 1"], seed=0, max_tokens=1, temperature=0)
    assert [choice.index for choice in several.choices] == [0, 1]


def test_stop_texts_end_an_answer_before_them(client):
    """Whole or streamed, nothing of the stop text is said, even where it came in pieces."""
    ask = {"model": "small", "prompt": "the mat", "seed": 2, "max_tokens": 40}
    text = client.completions.create(**ask).choices[0].text
    stop = text[10:13]
    cut = client.completions.create(**ask, stop=[stop, "never there"])
    assert cut.choices[0].text == text[: text.index(stop)]
    assert cut.choices[0].finish_reason == "stop"
    streamed = client.completions.create(**ask, stop=stop, stream=True)
    assert "".join(event.choices[0].text for event in streamed) == cut.choices[0].text


def test_a_character_of_several_tokens_comes_whole(made):
    """No half characters in a stream."""
    ids = made.tokenizer("a é 漢 b", add_special_tokens=False)["input_ids"]
    pieces = Pieces(made.tokenizer, ())
    said = [pieces.add(token) for token in ids]
    assert "".join(said) == "a é 漢 b"
    assert not any("\ufffd" in piece for piece in said)
    assert "" in said


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"n": 2}, "n is not served here"),
        ({"logprobs": 3}, "logprobs is not served here"),
        ({"temperature": 3}, "temperature: Input should be less than or equal to 2"),
        ({"top_p": 0}, "top_p: Input should be greater than 0"),
        ({"max_tokens": 0}, "max_tokens: Input should be greater than or equal to 1"),
        ({"max_tokens": 100_000}, "do not fit the context of"),
        ({"prompt": []}, "prompt holds 0 texts"),
        ({"prompt": [5, 100_000]}, "prompt holds ids outside 0 to"),
        ({"prompt": ["a", "b"], "stream": True}, "one prompt at a time is streamed"),
    ],
)
def test_what_is_not_served_is_refused_in_the_client_s_own_form(client, change, says):
    with pytest.raises(openai.UnprocessableEntityError) as refused:
        client.completions.create(**{"model": "small", "prompt": "x", **change})
    assert says in refused.value.body["message"]
    assert refused.value.body["type"] == "invalid_request_error"


def test_models_and_documentation(server, client):
    assert [model.id for model in client.models.list()] == ["small"]
    assert client.models.retrieve("small").id == "small"
    with pytest.raises(openai.UnprocessableEntityError, match="'gpt-5' is not served here"):
        client.models.retrieve("gpt-5")
    page = httpx.get(f"{server.address}/docs").text
    assert "/v1/chat/completions" in page
    assert "temperature" in page
    assert httpx.get(f"{server.address}/health").json()["name"] == "small"


def test_a_folder_of_a_language_model_is_served(made, tmp_path):
    """From disk, with its tokenizer; without a template a chat is refused with what to do."""
    save_student(made, tmp_path / "run" / "student")
    assert is_language(tmp_path / "run")
    serving = open_language(tmp_path / "run")
    serving.writer.tokenizer.chat_template = None
    with (
        running(build_language_app(serving)) as server,
        openai.OpenAI(base_url=f"{server.address}/v1", api_key="none", max_retries=0) as client,
    ):
        assert client.completions.create(model="run", prompt="the", max_tokens=2).model == "run"
        with pytest.raises(openai.UnprocessableEntityError, match="ask /v1/completions"):
            client.chat.completions.create(model="run", messages=[{"role": "user", "content": "x"}])


def test_what_is_heard_is_what_is_written(made):
    """The hook of writing: one call for each step, the tokens of each text in their order."""
    steps = []
    found = write(
        made.net, [[5, 6], [7]], torch.rand(2, 6), ends=(1,), heard=lambda tokens: steps.append(tokens.tolist())
    )
    for row, text in enumerate(found):
        assert [step[row] for step in steps][: len(text.tokens)] == list(text.tokens)
