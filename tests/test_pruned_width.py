"""Narrower students: heads, neurons and channels, and that only those that were cut are gone."""

import pytest
import torch

from pruned_nets import FAMILIES, SMALL, hidden, small_net
from stillroom.data import pack
from stillroom.errors import UsageError
from stillroom.students.pruned import cut_width, importance_of_width, pruned


@pytest.fixture
def rows(small_tokenizer):
    return pack(SMALL * 2, small_tokenizer, 24)


def zeroed(net, scores, heads, ffn):
    """By hand: the original with the least used groups and neurons made to give nothing."""
    size = net.model.layers[0].self_attn.head_dim
    for number, layer in enumerate(net.model.layers):
        for neuron in scores.ffn[number].argsort()[: net.config.intermediate_size - ffn].tolist():
            layer.mlp.down_proj.weight.data[:, neuron] = 0
        for group in scores.heads[number].argsort()[: (net.config.num_attention_heads - heads) // 2].tolist():
            layer.self_attn.o_proj.weight.data[:, group * 2 * size : (group + 1) * 2 * size] = 0
    return net


@pytest.mark.parametrize("kind", FAMILIES)
def test_fewer_heads_and_neurons_answer_as_the_whole_without_them(small_tokenizer, rows, kind, tmp_path):
    from transformers import AutoModelForCausalLM

    net = small_net(small_tokenizer, kind)
    scores = importance_of_width(net, rows)
    cut, choices = cut_width(net, scores, heads=2, ffn=30)
    ids = torch.arange(12) * 7 % len(small_tokenizer)
    expected = hidden(zeroed(net, scores, 2, 30), ids).compute()
    torch.testing.assert_close(hidden(cut, ids).compute(), expected)
    assert [(choice.cut, choice.before, choice.after) for choice in choices] == [("heads", 4, 2), ("ffn", 48, 30)]
    assert all(0.5 < choice.facts["importance_kept"] < 1 for choice in choices)
    cut.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.head_dim == net.model.layers[0].self_attn.head_dim  # said, not hidden / heads
    torch.testing.assert_close(hidden(loaded, ids).compute(), expected)
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert torch.equal(loaded.generate(ids[None], **settings), loaded.generate(ids[None], use_cache=False, **settings))


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
def test_channels_that_carry_nothing_are_cut_without_a_trace(small_tokenizer, rows, kind, tied, tmp_path):
    """Norms over fewer channels, Gemma's sqrt(hidden), tied or not: all of it is made up for."""
    from transformers import AutoModelForCausalLM

    net = small_net(small_tokenizer, kind, tie_word_embeddings=tied, rms_norm_eps=1e-12)
    dead = torch.tensor([0, 3, 5, 8, 13, 21, 30, 31])
    net.get_input_embeddings().weight.data[:, dead] = 0
    for layer in net.model.layers:
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            layer.get_submodule(name).weight.data[dead] = 0
    cut, (choice,) = cut_width(net, importance_of_width(net, rows), hidden=24)
    ids = torch.arange(12) * 7 % len(small_tokenizer)
    torch.testing.assert_close(hidden(cut, ids).compute(), hidden(net, ids).compute(), rtol=1e-3, atol=1e-3)
    assert (choice.before, choice.after, choice.facts["importance_kept"]) == (32, 24, pytest.approx(1))
    cut.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(hidden(loaded, ids).compute(), hidden(cut, ids).compute())


def test_importance_is_the_l2_norm_over_rows_of_mean_magnitudes(small_tokenizer, rows):
    """optipfair#34: padding is left out. By hand from what enters the projections, whatever the size of a batch."""
    net = small_net(small_tokenizer)
    caught = {}
    layer = net.model.layers[1]
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        layer.get_submodule(name).register_forward_pre_hook(
            lambda _module, args, name=name: caught.__setitem__(name, args[0])
        )
    batch = rows.batch(range(len(rows)))
    with torch.no_grad():
        net(batch.inputs["tokens"], position_ids=batch.inputs["positions"], use_cache=False)
    neurons, heads = caught["mlp.down_proj"].abs(), caught["self_attn.o_proj"].unflatten(-1, (4, 8)).norm(dim=-1)
    means = [
        torch.stack([values[n][batch.mask[n]].mean(0) for n in range(len(rows))]).double()
        for values in (neurons, heads.unflatten(-1, (2, 2)).sum(-1))
    ]
    for size in (1, 3):
        found = importance_of_width(net, rows, rows=None, batch_size=size)
        torch.testing.assert_close(found.ffn[1], means[0].norm(dim=0), rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(found.heads[1], means[1].norm(dim=0), rtol=1e-5, atol=1e-7)
        assert found.positions == int(batch.mask.sum())
        assert found.energy.sum(1) == pytest.approx([found.positions] * 9)  # 2 norms a layer and the last


def test_the_least_used_neuron_goes(small_tokenizer, rows):
    net = small_net(small_tokenizer)
    for layer in net.model.layers:
        layer.mlp.up_proj.weight.data[17] *= 1e-3
    scores = importance_of_width(net, rows)
    assert scores.ffn.argmin(-1).tolist() == [17] * 4
    before = net.model.layers[2].mlp.up_proj.weight
    cut, _ = cut_width(net, scores, ffn=47)
    kept = [number for number in range(48) if number != 17]
    assert torch.equal(cut.model.layers[2].mlp.up_proj.weight, before[kept])


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"heads": 3}, r"heads=3 cannot be used: choose 2 to 4, a multiple of 2 \(so many heads share keys\)"),
        ({"ffn": 49}, "ffn=49 cannot be used: choose 1 to 48"),
        ({"hidden": 0}, "hidden=0 cannot be used: choose 1 to 32"),
        ({"hidden": 30}, "does not exist in these sizes: .*not a multiple of the number of attention heads"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(small_tokenizer, rows, sizes, message):
    net = small_net(small_tokenizer)
    with pytest.raises(UsageError, match=message):
        cut_width(net, importance_of_width(net, rows), **sizes)


def test_importance_of_another_network_is_refused(small_tokenizer, rows):
    scores = importance_of_width(small_net(small_tokenizer, layers=2), rows)
    with pytest.raises(UsageError, match="measured on a network of other sizes"):
        cut_width(small_net(small_tokenizer), scores, ffn=24)


def test_layers_of_another_build_are_refused(small_tokenizer, rows):
    from transformers import MixtralConfig, MixtralForCausalLM, Phi3Config, Phi3ForCausalLM

    sizes = {"vocab_size": len(small_tokenizer), "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"intermediate_size": 48, "num_key_value_heads": 2, "pad_token_id": 0}
    experts = MixtralForCausalLM(MixtralConfig(**sizes)).eval()
    with pytest.raises(UsageError, match=r"layer 0 has no mlp.down_proj, so its width has no known meaning"):
        importance_of_width(experts, rows)
    joined = Phi3ForCausalLM(Phi3Config(**sizes)).eval()
    with pytest.raises(UsageError, match=r"nothing is known of the width of .*qkv_proj"):
        cut_width(joined, importance_of_width(joined, rows), ffn=24)


def test_all_cuts_in_one_call_each_measured_after_the_one_before(small_tokenizer, rows):
    net = small_net(small_tokenizer, "gemma3")
    student = pruned(net, small_tokenizer, rows, layers=[0, 1, 3], hidden=24, ffn=32, heads=2, vocabulary=300)
    assert [choice["cut"] for choice in student.made_by["pruned"]] == ["vocabulary", "layers", "heads", "ffn", "hidden"]
    config = student.net.config
    assert (config.num_hidden_layers, config.hidden_size, config.intermediate_size) == (3, 24, 32)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (2, 1, 16)
    assert config.vocab_size == len(student.tokenizer) <= 300
    assert config.layer_types == ["sliding_attention", "full_attention", "full_attention"]
    assert student.predict(pack(SMALL, student.tokenizer, 24).batch([0])).need_logits().compute().isfinite().all()
    assert net.config.num_hidden_layers == 4
