"""What a compressed folder holds, and that every way of running it gives the numbers the pipeline computed."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from lowbit.cache import PackedCache
from lowbit.modules import Linear, Norm
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_models import VOCAB
from transformers import AutoModelForCausalLM, OPTConfig

import ptq
from ptq import weights
from ptq.architectures import FAMILIES, geometry_of
from ptq.sites import input_sites


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def stored(folder) -> dict[str, torch.Tensor]:
    """Every tensor of a folder, read through its index."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    tensors = {}
    for file in sorted(set(index.values())):
        tensors |= load_file(folder / file)
    assert set(tensors) == set(index)
    return tensors


def unpacked(packed: torch.Tensor, bits: int, length: int) -> torch.Tensor:
    """Codes from the bit stream, bit by bit: element i lies at bits i*bits .. of its row, least significant first."""
    stream = (packed[..., None] >> torch.arange(8, dtype=torch.uint8)) & 1  # [R, bytes] -> [R, bytes, 8]
    stream = stream.flatten(1)[:, : length * bits].view(-1, length, bits)  # [R, bytes, 8] -> [R, K, bits]
    return (stream.long() << torch.arange(bits)).sum(-1)


def linears(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, Linear)}


def test_every_way_to_load_gives_what_the_pipeline_computed(family, w4a8, loaded, tokens):
    result, model = w4a8(family), loaded(family)
    left = []
    for block in model.get_submodule(FAMILIES[family].blocks):
        block.register_forward_hook(lambda _, args, out: left.append(out[0] if isinstance(out, tuple) else out))
    logits = model(tokens, use_cache=False).logits
    for block in model.get_submodule(FAMILIES[family].blocks):
        block._forward_hooks.clear()
    assert len(left) == len(result.left) == 2
    for theirs, ours in zip(left, result.left, strict=True):
        torch.testing.assert_close(theirs, ours, rtol=0, atol=0)
    assert torch.equal(model(tokens).logits, logits)  # prefill through the packed cache
    assert torch.equal(AutoModelForCausalLM.from_pretrained(result.out)(tokens).logits, logits)


def test_it_is_near_the_model_it_was_made_from(family, w4a8, loaded, tokens):
    expected = AutoModelForCausalLM.from_pretrained(w4a8(family).source)(tokens).logits
    error = float((loaded(family)(tokens).logits - expected).norm() / expected.norm())
    # 4-bit weights of a random model cost about 10 to 20 percent; a lost permutation costs about 140
    assert 1e-3 < error < 0.4


def test_generation_with_the_packed_cache_equals_generation_without(family, loaded, tokenizer):
    model = loaded(family)
    tokenizer.padding_side = "left"
    prompts = tokenizer(["The channels", "Sort them, cut them into clusters, and"], return_tensors="pt", padding=True)
    assert not prompts["attention_mask"].all()
    prompts.pop("token_type_ids", None)
    options = {
        "do_sample": False,
        "min_new_tokens": 10,
        "max_new_tokens": 10,
        "pad_token_id": 0,
        "return_dict_in_generate": True,
    }
    cached = model.generate(**prompts, **options)
    assert isinstance(cached.past_key_values, PackedCache)
    assert torch.equal(cached.sequences, model.generate(**prompts, **options, use_cache=False).sequences)


def test_tensors_on_disk_have_the_promised_bytes_and_mean_what_runs(family, w4a8, loaded):
    tensors, model = stored(w4a8(family).out), loaded(family)
    assert len(linears(model)) >= 2 * 4
    for name, linear in linears(model).items():
        R, C, G = linear.out_features, linear.in_features, linear.groups
        packed, scale, zero, groups = (tensors[f"{name}.weight_{t}"] for t in ("packed", "scale", "zero", "groups"))
        assert (packed.dtype, tuple(packed.shape)) == (torch.uint8, (R, -(-C * 4 // 8)))
        assert (zero.dtype, tuple(zero.shape)) == (torch.uint8, (R, -(-G * 4 // 8)))
        assert tuple(scale.shape) == (R, G) and groups.sum() == C and f"{name}.weight" not in tensors
        group = torch.arange(G).repeat_interleave(groups)
        codes, zeros = unpacked(packed, 4, C), unpacked(zero, 4, G)
        W = (codes - zeros[:, group]) * scale.float()[:, group]
        quantizers = linear.input_quantizer, linear.output_quantizer
        linear.input_quantizer = linear.output_quantizer = None
        runs = linear(torch.eye(C)).T if linear.bias is None else (linear(torch.eye(C)) - linear(torch.zeros(1, C))).T
        linear.input_quantizer, linear.output_quantizer = quantizers
        torch.testing.assert_close(runs, W, rtol=1e-6, atol=1e-6)  # adding and taking off the bias rounds


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_other_widths_are_packed_densely_too(bits, model_folder, recipe_for, run, tmp_path):
    report = run(recipe_for(model_folder("opt"), weights={"bits": bits, "solver": "rtn"}), tmp_path / "o")
    tensors = stored(tmp_path / "o")
    packed = tensors["model.decoder.layers.0.fc2.weight_packed"]
    assert tuple(packed.shape) == (64, 96 * bits // 8)
    row = next(m for m in report["modules"] if m["name"].endswith("0.fc2"))
    nbytes = sum(
        t.numel() * t.element_size() for n, t in tensors.items() if n.startswith("model.decoder.layers.0.fc2.weight")
    )
    assert row["effective_bits"] == pytest.approx(8 * nbytes / (64 * 96))


def test_weight_groups_lie_inside_the_clusters_of_the_input(family, w4a8, loaded):
    model, spec = loaded(family), FAMILIES[family]
    with safe_open(w4a8(family).out / "channel_ranges.safetensors", framework="pt") as ranges:
        for i, block in enumerate(model.get_submodule(spec.blocks)):
            for site in input_sites(spec):
                sizes = ranges.get_tensor(f"blocks.{i}.{site.name}.sizes").int()
                first = block.get_submodule(site.linears[0])
                grid = first.input_quantizer if site.norm is None else block.get_submodule(site.norm).quantizer
                assert sizes.numel() > 1 and torch.equal(grid.sizes, sizes)
                for path in site.linears:
                    groups = block.get_submodule(path).weight_groups
                    assert set(sizes.cumsum(0).tolist()) <= set(groups.cumsum(0).tolist()) and groups.max() <= 16
                if site.norm is not None:
                    perm = ranges.get_tensor(f"blocks.{i}.{site.name}.permutation").int()
                    assert torch.equal(block.get_submodule(site.norm).permutation, perm)


@pytest.fixture(scope="module")
def hessians(model_folder, recipe_for, run, tmp_path_factory):
    """(preset, options) -> (folder, H by block and site as the solver got it) of a llama run."""

    def made(preset, **options):
        seen, solve = {}, weights.compress_site

        def keep(block, site, recipe, H, orders, prefix, **options):
            seen.setdefault(int(prefix.rpartition(".")[2]), {})[site.name] = H.clone()
            return solve(block, site, recipe, H, orders, prefix, **options)

        out = tmp_path_factory.mktemp("h") / "o"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(weights, "compress_site", keep)
            run(recipe_for(model_folder("llama"), preset=preset, **options), out)
        return out, seen

    return made


def test_h_is_that_of_the_permuted_quantized_inputs_of_the_compressed_blocks_before(hessians, tokens):
    out, H = hessians("W4A4")
    model = ptq.load(out)
    inputs = {}
    for i, block in enumerate(model.model.layers):
        block.self_attn.q_proj.register_forward_pre_hook(lambda _, args, i=i: inputs.update({i: args[0].flatten(0, 1)}))
    model(tokens, use_cache=False)
    for i in range(2):
        # the loaded model's norm feeds q_proj exactly what H was summed from, in the same order
        torch.testing.assert_close(H[i]["R1"], inputs[i].T @ inputs[i], rtol=1e-4, atol=1e-3)


def test_h_of_quantized_linear_inputs_lies_on_the_product_of_their_grids(hessians):
    out, H = hessians("W4A4")
    model = ptq.load(out)
    for i, block in enumerate(model.model.layers):
        for name, linear in {"R3": block.self_attn.o_proj, "R5": block.mlp.down_proj}.items():
            grid = linear.input_quantizer
            s = grid.scale.repeat_interleave(grid.sizes)
            steps = H[i][name] / torch.outer(s, s)  # sums of products of whole numbers
            assert float(steps.abs().max()) > 100
            assert float((steps - steps.round()).abs().max()) < 0.05  # float32 sums; unquantized ones miss by 0.5


def test_h_sees_quantized_keys_and_values(hessians):
    _, full = hessians("W4A16")
    _, kv = hessians("W4A3KV")
    assert torch.equal(full[0]["R1"], kv[0]["R1"])  # before any key or value
    assert float((full[0]["R3"] - kv[0]["R3"]).norm() / full[0]["R3"].norm()) > 0.01


def test_a_run_that_does_not_quantize_activations_gets_the_same_h_from_one_pass(hessians, tokens):
    out, H = hessians("W4A16")
    inputs = []
    model = ptq.load(out)
    model.model.layers[0].self_attn.q_proj.register_forward_pre_hook(
        lambda _, args: inputs.append(args[0].flatten(0, 1))
    )
    model(tokens, use_cache=False)
    torch.testing.assert_close(H[0]["R1"], inputs[0].T @ inputs[0], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_half_precision_checkpoints_keep_their_dtype_and_their_grids(
    dtype, model_folder, recipe_for, run, tmp_path, tokens
):
    source = model_folder("llama", dtype)
    run(recipe_for(source, preset="W4A8"), tmp_path / "o")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "o")
    norm = model.model.layers[0].input_layernorm
    assert isinstance(norm, Norm) and norm.weight.dtype == dtype
    assert norm.quantizer.scale.dtype == norm.quantizer.zero.dtype == torch.float32
    logits = model(tokens).logits
    expected = AutoModelForCausalLM.from_pretrained(source)(tokens).logits
    assert logits.dtype == dtype
    assert float((logits - expected).float().norm() / expected.float().norm()) < 0.4  # 4-bit weights; see above
    assert ptq.load(tmp_path / "o")(tokens).logits.dtype == torch.float32


def test_tied_embeddings_stay_tied(w4a8, loaded):
    model = loaded("qwen2")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert "lm_head.weight" not in stored(w4a8("qwen2").out)


def test_what_lies_beside_the_weights(w4a8, tokenizer):
    out = w4a8("opt").out
    names = {p.name for p in out.iterdir()}
    shards = {f"model-{i:05d}-of-00003.safetensors" for i in (1, 2, 3)}
    beside = {"config.json", "tokenizer.json", "recipe.yaml", "report.json", "README.md", "channel_ranges.safetensors"}
    assert shards | beside <= names and not any(n.startswith(("activations", "ranges-", "ledger", ".")) for n in names)
    assert ptq.load_tokenizer(out)("The channels")["input_ids"] == tokenizer("The channels")["input_ids"]


def test_every_parameter_is_counted_once(family, w4a8):
    coverage = w4a8(family).report["coverage"]
    parameters = AutoModelForCausalLM.from_pretrained(w4a8(family).source).parameters()  # a tied one comes once
    expected = sum(p.numel() for p in parameters)
    assert coverage["compressed_parameters"] + coverage["other_parameters"] == expected


def test_bits_of_a_cached_value_are_the_bytes_that_the_cache_holds(family, w4a8, loaded, tokens):
    cache = loaded(family)(tokens[:1]).past_key_values
    spec = FAMILIES[family]
    geometry = geometry_of(loaded(family).config, spec)
    values = 2 * geometry.kv_heads * geometry.head_dim * len(loaded(family).get_submodule(spec.blocks))
    bits = 8 * cache.packed_bytes / (values * tokens.shape[1])
    assert w4a8(family).report["bits"]["kv_bits_effective"] == pytest.approx(bits)
    assert (bits > 8) == (spec.rotary is not None)


def test_group4_says_that_its_cache_is_in_full_precision(tokenizer, recipe_for, run, tmp_path, tokens):
    # its codec needs heads of whole groups of 64 channels
    config = OPTConfig(
        vocab_size=VOCAB, hidden_size=64, word_embed_proj_dim=64, ffn_dim=64, num_hidden_layers=1, num_attention_heads=1
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    report = run(recipe_for(tmp_path / "m", method="group4", activations={"kv_bits": 4}), tmp_path / "o")
    assert report["bits"]["kv_bits_effective"] is None
    assert report["warnings"] == ["group4 keys and values are rounded, the cache itself holds full precision"]
    assert not isinstance(ptq.load(tmp_path / "o")(tokens).past_key_values, PackedCache)


def test_the_report_and_the_card_tell_the_bits_of_softmax_that_run(w4a8):
    for family, bits, said in (("opt", 8, "8"), ("bloom", 16, "16 (full precision)")):
        out, report = w4a8(family).out, w4a8(family).report
        assert report["recipe"]["activations"]["softmax_bits"] == 8 and report["bits"]["softmax"] == bits
        assert f"| softmax | {said} |" in (out / "README.md").read_text(encoding="utf8")


def test_of_a_local_source_neither_a_revision_nor_code_is_claimed(model_folder, recipe_for, run, tmp_path):
    # as the hub's cache names its folders
    source = shutil.copytree(model_folder("opt"), tmp_path / "snapshots" / "0123abc")
    config = json.loads((source / "config.json").read_text()) | {"auto_map": {"AutoConfig": "theirs.Config"}}
    (source / "config.json").write_text(json.dumps(config))
    report = run(recipe_for(source, weights={"bits": 8, "solver": "rtn"}), tmp_path / "o")
    assert report["base_model"]["revision"] is None
    assert "auto_map" not in json.loads((tmp_path / "o" / "config.json").read_text())


def test_the_other_methods_run_as_saved(model_folder, recipe_for, run, tmp_path, tokens):
    expected = AutoModelForCausalLM.from_pretrained(model_folder("llama"))(tokens).logits
    token_grid = {"bits": 8, "norm_bits": 8, "q_bits": 8, "grid": "token"}
    for name, options in {
        "rtn": {"method": "rtn", "preset": "W4A8"},
        "gptq": {"method": "gptq", "preset": "W4A8"},
        "smoothquant": {"method": "smoothquant", "preset": "W4A8"},
        "group4": {"method": "group4", "preset": "W4A16"},
        "token": {"method": "gptq", "weights": {"bits": 4, "groups": 32}, "activations": token_grid},
    }.items():
        run(recipe_for(model_folder("llama"), **options), tmp_path / name)
        logits = ptq.load(tmp_path / name)(tokens).logits
        # round to nearest costs up to 45 percent here; a wrong layout costs about 140
        assert float((logits - expected).norm() / expected.norm()) < 0.6, name


def test_a_packed_model_saved_by_transformers_loads_again(loaded, tmp_path, tokens):
    loaded("qwen2").save_pretrained(tmp_path / "again")
    assert torch.equal(ptq.load(tmp_path / "again")(tokens).logits, loaded("qwen2")(tokens).logits)
