"""Families with experts: their blocks, sites and tensors against transformers' models, and H shrunk against plain numbers."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import MOE, build_model
from transformers import AutoModelForCausalLM

from ptq.architectures import FAMILIES, has_experts, spec_for
from ptq.blocks import linear_paths, load_block, record_calls, run_block, skeleton, swap, tensor_names
from ptq.errors import BadInput, NumericalFailure, UnsupportedModel
from ptq.experts import check_recipe, down_hessian, gate_up_hessian
from ptq.layout import source_tensors
from ptq.recipe_build import build
from ptq.sites import block_sites, input_sites
from ptq.source import open_checkpoint

TOKENS = torch.randint(3, 300, (3, 20), generator=torch.Generator().manual_seed(0))
LAYOUTS = ("apart", "fused")


@pytest.fixture(scope="module")
def folder_of(model_folder, tmp_path_factory):
    """(family, layout) -> a checkpoint: "apart" as save_pretrained writes it, "fused" with the names that the model has in memory."""

    def folder(family, layout):
        if layout == "apart":
            return model_folder(family)
        path, model = tmp_path_factory.mktemp(family), build_model(family)
        model.config.save_pretrained(path)
        save_file(model.state_dict(), path / "model.safetensors", metadata={"format": "pt"})
        return path

    return folder


def opened(folder):
    checkpoint = open_checkpoint(folder)
    model = skeleton(checkpoint)
    spec = spec_for(checkpoint.config, model)
    model.set_attn_implementation("eager")
    names = tensor_names(model, spec, checkpoint)

    def block(i):
        return load_block(model, spec, i, names, checkpoint, device="cpu")

    return SimpleNamespace(checkpoint=checkpoint, model=model, spec=spec, names=names, block=block)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", MOE)
def test_loaded_blocks_compute_what_the_model_computes(family, layout, folder_of):
    folder = folder_of(family, layout)
    seen = opened(folder)
    states, calls = record_calls(
        seen.model, seen.spec, seen.names, seen.checkpoint, [TOKENS], device="cpu", dtype=torch.float32
    )
    x, left = states[0], []
    whole = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    for layer in whole.model.layers:
        layer.register_forward_hook(lambda _, args, out: left.append(out))
    with torch.no_grad():
        whole(TOKENS)
        for i, expected in enumerate(left):
            x = run_block(seen.block(i), x, calls[i][3])
            # float32: the experts of a token may be added in another order; a wrong expert is off by about 1
            assert float((x - expected).abs().max() / expected.abs().max()) < 1e-5


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", MOE)
def test_blocks_go_back_under_the_checkpoint_s_names_and_layout(family, layout, folder_of):
    seen = opened(folder_of(family, layout))
    written = {}
    for i in range(2):
        block = seen.block(i)
        for path in linear_paths(seen.spec, block):  # as a solver changes them
            linear = block.get_submodule(path)
            linear.weight = linear.weight * 2
        written |= source_tensors(block, seen.model, seen.spec, i, seen.names, seen.checkpoint)
    truth = load_file(seen.checkpoint.folder / "model.safetensors")
    inside = {name: t for name, t in truth.items() if ".layers." in name}
    assert written.keys() == inside.keys()
    whole = re.compile(r"norm|bias|\.gate\.weight|shared_expert_gate")  # norms, biases and routers are not compressed
    for name, t in inside.items():
        assert torch.equal(written[name], t if whole.search(name) else 2 * t), name


def test_gpt2_goes_back_transposed_and_neox_under_its_old_names(model_folder):
    for family in ("gpt2", "gpt_neox"):
        seen = opened(model_folder(family))
        truth = load_file(seen.checkpoint.folder / "model.safetensors")
        written = source_tensors(seen.block(1), seen.model, seen.spec, 1, seen.names, seen.checkpoint)
        assert len(written) >= 12 and all(torch.equal(t, truth[name]) for name, t in written.items())


def broken(folder, tmp_path, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    return tmp_path


EXPERT = {
    "mixtral": "model.layers.1.block_sparse_moe.experts.2.w2.weight",
    "qwen2_moe": "model.layers.0.mlp.experts.2.down_proj.weight",
    "qwen3_moe": "model.layers.1.mlp.experts.2.down_proj.weight",
}


@pytest.mark.parametrize("family", MOE)
def test_experts_that_are_missing_too_many_or_of_another_shape(family, folder_of, tmp_path):
    folder, name = folder_of(family, "apart"), EXPERT[family]

    def add(tensors):
        tensors[name.replace("experts.2", "experts.4")] = torch.zeros(32, 48)

    changes = {
        r"experts.2.(w2|down_proj).weight is missing": lambda tensors: tensors.pop(name),
        r"experts.2.* is \[31, 48\], the config says \[32, 48\]": lambda t: t.update({name: t[name][:31].clone()}),
        r"1 tensors have no place in the model that the config describes, first .*experts.4": add,
    }
    for message, change in changes.items():
        with pytest.raises(BadInput, match=message) as caught:
            opened(broken(folder, tmp_path, change))
        assert "\n" not in str(caught.value)


def test_fused_experts_of_another_shape_or_with_bad_weights_in_one_expert(folder_of, tmp_path):
    folder, name = folder_of("qwen3_moe", "fused"), "model.layers.0.mlp.experts.gate_up_proj"
    with pytest.raises(BadInput, match=r"gate_up_proj is \[3, 96, 32\], the config says \[4, 96, 32\]"):
        opened(broken(folder, tmp_path, lambda t: t.update({name: t[name][:3].clone()})))

    def spoil(tensors):
        tensors[name][2, 50:52, 0] = torch.nan  # rows 48 to 96 are up

    seen = opened(broken(folder, tmp_path, spoil))
    # 48 x 32 weights: only one expert's up was read
    with pytest.raises(BadInput, match=r"gate_up_proj has 2 NaN or infinite of 1536 weights"):
        seen.block(0)


@pytest.mark.parametrize("family", MOE)
def test_sites_are_listed_in_the_order_in_which_a_forward_reaches_them(family, folder_of):
    seen = opened(folder_of(family, "apart"))
    block = seen.block(0)
    sites, reached, rows = block_sites(seen.spec, block), [], {}
    for site in sites:

        def hook(_, args, name=site.name):
            reached.append(name)
            rows[name] = args[0].numel() // args[0].shape[-1]

        block.get_submodule(site.entry).register_forward_pre_hook(hook)
    states, calls = record_calls(
        seen.model, seen.spec, seen.names, seen.checkpoint, [TOKENS], device="cpu", dtype=torch.float32
    )
    with torch.no_grad():
        run_block(block, states[0], calls[0][3])
    assert reached == [site.name for site in sites]
    experts = [site for site in sites if site.expert is not None]
    assert [site.name for site in experts] == [f"{name}.e{e}" for e in range(4) for name in ("R4", "R5")]
    assert all(rows[f"R4.e{e}"] == rows[f"R5.e{e}"] < 60 for e in range(4))
    assert sum(rows[f"R4.e{e}"] for e in range(4)) == 2 * 60 == 2 * rows["R4"]  # two experts a token


@pytest.mark.parametrize("family", MOE)
def test_every_weight_of_a_block_is_compressed_but_router_and_gate(family, folder_of):
    seen = opened(folder_of(family, "apart"))
    block = seen.block(0)
    wide = {name.removesuffix(".weight") for name, t in block.state_dict().items() if t.ndim == 2}
    assert wide - {"mlp.gate", "mlp.shared_expert_gate"} == set(linear_paths(seen.spec, block))
    assert len(linear_paths(seen.spec, block)) == 4 + 4 * 3 + (3 if family == "qwen2_moe" else 0)


def test_a_block_without_experts_has_the_sites_of_a_dense_one(folder_of):
    seen = opened(folder_of("qwen2_moe", "apart"))
    assert [has_experts(seen.spec, seen.block(i)) for i in (0, 1)] == [True, False]
    assert block_sites(seen.spec, seen.block(1)) == input_sites(seen.spec)
    llama = build_model("llama")
    assert block_sites(FAMILIES["llama"], llama.model.layers[0]) == input_sites(FAMILIES["llama"])


def test_a_block_without_the_router_that_the_spec_names_is_refused():
    model = build_model("mixtral")
    swap(model.model.layers[1], "mlp", lambda mlp: torch.nn.ModuleDict({"experts": mlp.experts}))
    with pytest.raises(UnsupportedModel, match="model.layers.1 has no mlp.gate; it has .*mlp.experts"):
        spec_for(model.config, model)


def gram(x):
    return x.T @ x  # [n, C] -> [C, C]


def test_h_of_an_expert_is_shrunk_as_the_formula_says():
    C, n_e, n = 4, 6, 10
    tokens = torch.randn(n, C, generator=torch.Generator().manual_seed(0)).double()
    H_e, H = gram(tokens[:n_e]), gram(tokens)
    a = C / (C + n_e)
    layer = H.clone()
    found = gate_up_hessian(H_e.clone(), n_e, layer, n)
    torch.testing.assert_close(found, (1 - a) * H_e / n_e + a * H / n)
    assert torch.equal(layer, H)
    found = down_hessian(H_e.clone(), n_e)
    torch.testing.assert_close(found, (1 - a) * H_e / n_e + a * torch.diag(H_e.diagonal()) / n_e)


def test_the_limits_no_token_as_many_as_channels_and_very_many():
    H, C = torch.tensor([[8.0, 2.0], [2.0, 4.0]]), 2
    own = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
    none = torch.zeros(2, 2)
    assert torch.equal(gate_up_hessian(none.clone(), 0, H, 4), H / 4)
    assert torch.equal(down_hessian(none.clone(), 0), torch.eye(2))
    assert torch.equal(gate_up_hessian(own * C, C, H, 4), (own + H / 4) / 2)
    assert torch.equal(down_hessian(own * C, C), torch.tensor([[1.0, -0.5], [-0.5, 1.0]]))
    many = 10**7  # a = 2e-7
    torch.testing.assert_close(gate_up_hessian(own * many, many, H, 4), own, rtol=0, atol=1e-5)
    torch.testing.assert_close(down_hessian(own * many, many), own, rtol=0, atol=1e-5)
    with pytest.raises(NumericalFailure, match="no token reached the router"):
        gate_up_hessian(none, 0, none, 0)


def test_fewer_tokens_than_channels_still_give_a_full_rank():
    x = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    layer = gram(torch.randn(64, 16, generator=torch.Generator().manual_seed(1)))
    assert torch.linalg.matrix_rank(gram(x)) == 3
    for H in (gate_up_hessian(gram(x), 3, layer, 64), down_hessian(gram(x), 3)):
        assert torch.equal(H, H.T) and float(torch.linalg.eigvalsh(H).min()) > 1e-3


@pytest.mark.parametrize(
    "options",
    [
        {"preset": "W4A16"},
        {"method": "smoothquant"},
        {"method": "gptq", "activations": {"kv_bits": 4, "grid": "token"}},
        {"method": "rtn", "activations": {"norm_bits": 8, "grid": "token"}},
    ],
    ids=["reordered", "smoothed", "kv bits", "activation bits"],
)
def test_recipes_that_need_reordered_or_quantized_activations_are_refused(options):
    recipe = build(**options)
    with pytest.raises(UnsupportedModel, match="mixtral has experts: what works is ptq prune") as caught:
        check_recipe(FAMILIES["mixtral"], recipe)
    assert caught.value.exit_code == 3 and "\n" not in str(caught.value)
    check_recipe(FAMILIES["llama"], recipe)


@pytest.mark.parametrize(
    "options", [{"method": "sparsegpt", "pruning": {"keep": "2:4"}}, {"method": "gptq", "weights": {"bits": 4}}]
)
def test_recipes_for_weights_alone_are_not(options):
    check_recipe(FAMILIES["mixtral"], build(**options))
