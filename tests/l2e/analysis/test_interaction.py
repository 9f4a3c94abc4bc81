"""Which weights are sampled, from which files, and how far nodes reach."""

import networkx
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from l2e.analysis.interaction import (
    Architecture,
    draw_samples,
    node_counts,
    open_weights,
    sampled_network,
)
from l2e.analysis.series import read_series
from l2e.analysis.weights import Weights
from tests.l2e.analysis.conftest import make_model


@pytest.fixture(params=["gpt_neox", "gpt2", "llama"])
def family(request):
    return request.param


def test_samples_follow_the_published_draws():
    architecture = open_architecture(layers=2, hidden=100)
    samples = draw_samples(architecture, 8, seed=3)
    np.random.seed(3)  # noqa: NPY002
    for block in range(2):
        for name, count, among in [
            ("block_input", 8, 100),
            ("channels", 8, 100),
            ("attention_output", 8, 100),
            ("hidden", 16, 400),
        ]:
            expected = np.random.choice(np.arange(among), count, replace=False)  # noqa: NPY002
            np.testing.assert_array_equal(getattr(samples[block], name), expected)
    np.testing.assert_array_equal(samples[0].block_output, samples[1].block_input)


def open_architecture(layers, hidden):
    return Architecture("gpt_neox", layers, hidden, 4 * hidden, 4, 4, hidden // 4)


def test_a_sample_larger_than_the_model_is_refused():
    with pytest.raises(ValueError, match="at most 16"):
        draw_samples(open_architecture(layers=1, hidden=16), 64, 0)


@pytest.mark.parametrize("layout", ["per_head", "flat"])
def test_sampled_weights_are_those_of_the_model(family, layout, tmp_path):
    model = make_model(family, layers=2)
    model.save_pretrained(tmp_path)
    [checkpoint] = map(open_weights, read_series([str(tmp_path)]))
    sample = draw_samples(checkpoint.architecture, 8, seed=0)
    found = sampled_network(checkpoint, sample, layout)
    blocks = getattr(model.base_model, "h" if family == "gpt2" else "layers")
    for number, (block, s) in enumerate(zip(blocks, sample, strict=True)):
        qkv, dense, up, down = (torch.from_numpy(m).float() for m in found[4 * number :][:4])
        # A unit put in at a source appears at a target with the weight between them.
        if family == "gpt_neox":
            projected = block.attention.query_key_value.weight.T[s.block_input]
            if layout == "per_head":  # as the model splits it: heads, then q, k, v
                parts = projected.view(8, 4, 3, 8).permute(0, 2, 1, 3).reshape(8, 3, 32)
            else:
                parts = projected.view(8, 3, 32)
            attention, mlp = block.attention.dense, block.mlp
            inward, outward = mlp.dense_h_to_4h.weight.T, mlp.dense_4h_to_h.weight.T
            dense_weight = attention.weight.T
        elif family == "gpt2":
            parts = block.attn.c_attn.weight[s.block_input].view(8, 3, 32)
            dense_weight = block.attn.c_proj.weight
            inward, outward = block.mlp.c_fc.weight, block.mlp.c_proj.weight
        else:
            a = block.self_attn
            # two key-value heads serve four query heads
            repeated = [
                linear.weight.T.view(32, 2, 1, 8).expand(32, 2, 2, 8).reshape(32, 32)
                for linear in (a.k_proj, a.v_proj)
            ]
            parts = torch.stack([a.q_proj.weight.T, *repeated], dim=1)[s.block_input]
            dense_weight = a.o_proj.weight.T
            inward, outward = block.mlp.gate_proj.weight.T, block.mlp.down_proj.weight.T
        expected = parts[:, :, s.channels].reshape(8, 24)
        assert torch.equal(qkv, expected)
        assert torch.equal(dense, dense_weight[s.channels][:, s.attention_output])
        assert torch.equal(up, inward[s.attention_output][:, s.hidden])
        assert torch.equal(down, outward[s.hidden][:, s.block_output])


def test_heads_may_be_wider_than_their_share_of_the_model(tmp_path):
    """A configuration's head_dim: channels come from all of the attention's width."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
        head_dim=20,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(tmp_path)
    [weights] = map(open_weights, read_series([str(tmp_path)]))
    assert weights.architecture.channels == 80
    samples = draw_samples(weights.architecture, 30, seed=0)
    [s] = samples
    assert s.channels.max() >= 32
    qkv, dense, _, _ = (
        torch.from_numpy(m).float() for m in sampled_network(weights, samples, "per_head")
    )
    a = model.model.layers[0].self_attn
    assert torch.equal(dense, a.o_proj.weight.T[s.channels][:, s.attention_output])
    keys = a.k_proj.weight.T.view(32, 2, 1, 20).expand(32, 2, 2, 20).reshape(32, 80)
    assert torch.equal(qkv[:, 30:60], keys[s.block_input][:, s.channels])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_file_format_gives_the_same_entries(dtype, tmp_path):
    model = make_model("gpt_neox").to(dtype)
    model.save_pretrained(tmp_path / "new")
    (tmp_path / "old").mkdir()
    torch.save(model.state_dict(), tmp_path / "old" / "pytorch_model.bin")
    name = "layers.1.mlp.dense_h_to_4h.weight"
    rows, columns = np.array([5, 3, 100]), np.array([31, 0])
    expected = model.gpt_neox.get_parameter(name)[rows][:, columns].double().detach().numpy()
    for folder in ("new", "old"):
        found = Weights(tmp_path / folder).entries(name, rows, columns)
        np.testing.assert_array_equal(found, expected)


def test_quantised_weights_and_hurt_files_are_refused(tmp_path):
    save_file({"layers.0.x": torch.ones(4, 4, dtype=torch.int8)}, tmp_path / "model.safetensors")
    place = np.array([0])
    with pytest.raises(ValueError, match=r"layers.0.x is stored as torch.int8"):
        Weights(tmp_path).entries("layers.0.x", place, place)
    (tmp_path / "model.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(ValueError, match=r"model.safetensors: no readable"):
        Weights(tmp_path)


def test_missing_files_and_weights_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"no \*.safetensors"):
        Weights(tmp_path)
    make_model("gpt_neox").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no weight named nothing"):
        Weights(tmp_path).shape("nothing")


def test_hops_are_shortest_paths():
    random = np.random.default_rng(0)
    s = 6
    shapes = [(s, 3 * s), (s, s), (s, 2 * s), (2 * s, s)] * 2
    matrices = [random.normal(size=shape) * 0.1 for shape in shapes]
    graph = networkx.DiGraph()
    for level, matrix in enumerate(matrices):
        # q, k and v of a channel are three ends of paths, and lead on to the same nodes.
        copies = 3 if level and matrices[level - 1].shape[1] == 3 * s else 1
        for i, j in np.ndindex(matrix.shape):
            for copy in range(copies):
                edge = (level, i + copy * s), (level + 1, j)
                graph.add_edge(*edge, weight=1 / abs(matrix[i, j]))
    for hops in (2, 3):
        found = node_counts(matrices, threshold=150, hops=hops)
        row = 0
        for level, matrix in enumerate(matrices):
            for i in range(len(matrix)):
                lengths = networkx.single_source_dijkstra_path_length(graph, (level, i))
                reached = [d for (at, _), d in lengths.items() if level < at <= level + hops]
                expected = np.bincount(
                    np.rint([d for d in reached if 1 < d <= 150]).astype(int), minlength=151
                )
                np.testing.assert_array_equal(found[row], expected)
                row += 1
