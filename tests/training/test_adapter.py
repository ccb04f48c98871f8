"""Adapter files: both layouts hold the same deltas, diffusers opens them, bad files are named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from training import adapter, kohya
from training.adapter import Adapter, AdapterError, Factors

HIDDEN = 8
"""Of the stand-in for FLUX.1: as many blocks and names, a 384th of the width."""


@pytest.fixture(scope="module")
def shapes() -> dict[str, tuple[int, int]]:
    """The linears of both block types of FLUX.1, named by diffusers: 494."""
    from diffusers import FluxTransformer2DModel

    with torch.device("meta"):
        model = FluxTransformer2DModel(attention_head_dim=HIDDEN, num_attention_heads=1)
    return {
        f"transformer.{name}": tuple(one.weight.shape)
        for name, one in model.named_modules()
        if isinstance(one, nn.Linear) and "transformer_blocks" in name
    }


def random(shapes: dict[str, tuple[int, int]], rank: int = 2, alpha: float = 3.0) -> Adapter:
    draw = torch.Generator().manual_seed(0)
    return Adapter(
        {
            name: Factors(
                torch.randn(rank, width, generator=draw),
                torch.randn(rows, rank, generator=draw),
                alpha,
            )
            for name, (rows, width) in shapes.items()
        },
        {"description": "a test", "data_sha256": "0" * 64},
    )


def same(a: Adapter, b: Adapter, exact: bool = True) -> None:
    assert set(a.layers) == set(b.layers)
    for name, one in a.layers.items():
        if exact:
            assert torch.equal(one.delta(), b.layers[name].delta()), name
        else:
            torch.testing.assert_close(one.delta(), b.layers[name].delta())
    assert a.about == b.about


@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
def test_what_is_written_is_read(shapes, tmp_path, layout):
    given = random(shapes)
    adapter.write(tmp_path / "a.safetensors", given, layout)
    found = adapter.read(tmp_path / "a.safetensors")
    same(given, found)
    assert all(one.rank == 2 for one in found.layers.values())
    again = tmp_path / "b.safetensors"
    adapter.write(again, found, layout)
    assert again.read_bytes() == (tmp_path / "a.safetensors").read_bytes()


def test_494_layers_are_304_modules_of_kohya(shapes, tmp_path):
    assert len(shapes) == 494
    adapter.write(tmp_path / "a.safetensors", random(shapes), "kohya")
    names = {key.split(".")[0] for key in load_file(tmp_path / "a.safetensors")}
    assert len(names) == 304
    assert {layer for name in names for layer in kohya.parts(name)} == set(shapes)
    assert "lora_unet_double_blocks_0_img_attn_qkv" in names
    assert "lora_unet_single_blocks_37_modulation_lin" in names


def published() -> dict[str, Tensor]:
    """All of FLUX.1's modules as kohya's trainer writes them: one `down` for what is fused."""
    draw = torch.Generator().manual_seed(0)
    wide = {"img_mlp_2": 4, "txt_mlp_2": 4, "linear2": 5}
    rows = {"qkv": 3, "proj": 1, "mlp_0": 4, "mlp_2": 1, "mod_lin": 6}
    rows |= {"linear1": 7, "linear2": 1, "modulation_lin": 3}
    double = ("attn_qkv", "attn_proj", "mlp_0", "mlp_2", "mod_lin")
    single = ("linear1", "linear2", "modulation_lin")
    names = [
        f"double_blocks_{i}_{s}_{n}" for i in range(19) for s in ("img", "txt") for n in double
    ]
    names += [f"single_blocks_{i}_{n}" for i in range(38) for n in single]
    content = {}
    for name in names:
        width = HIDDEN * next((n for end, n in wide.items() if name.endswith(end)), 1)
        count = HIDDEN * next(n for end, n in rows.items() if name.endswith(end))
        key = f"lora_unet_{name}"
        content[f"{key}.lora_down.weight"] = torch.randn(4, width, generator=draw).bfloat16()
        content[f"{key}.lora_up.weight"] = torch.randn(count, 4, generator=draw).bfloat16()
        content[f"{key}.alpha"] = torch.tensor(2.0, dtype=torch.bfloat16)
    return content


def test_a_published_file_of_304_modules(shapes, tmp_path):
    content = published()
    assert len(content) == 3 * 304
    save_file(content, tmp_path / "a.safetensors", metadata={"ss_network_dim": "4"})
    found = adapter.read(tmp_path / "a.safetensors")
    assert found.about == {"ss_network_dim": "4"}
    assert {n: tuple(one.delta().shape) for n, one in found.layers.items()} == shapes
    assert all(one.down.dtype == torch.float32 for one in found.layers.values())
    key = "lora_unet_single_blocks_5_linear1"
    fused = content[f"{key}.lora_up.weight"].float() @ content[f"{key}.lora_down.weight"].float()
    block = "transformer.single_transformer_blocks.5"
    parts = [found.layers[f"{block}.{one}"] for one in ("attn.to_q", "attn.to_k", "attn.to_v")]
    parts.append(found.layers[f"{block}.proj_mlp"])
    torch.testing.assert_close(torch.cat([one.delta() for one in parts]), fused / 2)
    # Shared factors stay shared: kohya's rank, and kohya's numbers.
    adapter.write(tmp_path / "b.safetensors", found, "kohya")
    again = load_file(tmp_path / "b.safetensors")
    assert again.keys() == content.keys()
    assert all(torch.equal(again[name], one.float()) for name, one in content.items())


def test_fused_layers_are_written_block_diagonally(shapes, tmp_path):
    names = [n for n in shapes if n.startswith("transformer.single_transformer_blocks.3.")]
    given = random({name: shapes[name] for name in names})
    adapter.write(tmp_path / "a.safetensors", given, "kohya")
    content = load_file(tmp_path / "a.safetensors")
    key = "lora_unet_single_blocks_3_linear1"
    assert content[f"{key}.lora_down.weight"].shape == (8, HIDDEN)
    assert float(content[f"{key}.alpha"]) == 4 * 3.0
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        told = json.loads(file.metadata()["dermaflux.ranks"])
    assert told == {key: [2, 2, 2, 2]}
    # Another program's file says no ranks: they are seen in the zeros.
    save_file(content, tmp_path / "untold.safetensors")
    found = adapter.read(tmp_path / "untold.safetensors")
    same(Adapter(given.layers), found)
    assert all(one.rank == 2 for one in found.layers.values())


def test_parts_of_fused_layers_with_ranks_and_alphas_of_their_own(shapes, tmp_path):
    block = "transformer.single_transformer_blocks.0"
    layers = {
        f"{block}.attn.to_k": Factors(torch.randn(2, 8), torch.randn(8, 2), 3.0),
        f"{block}.proj_mlp": Factors(torch.randn(3, 8), torch.randn(32, 3), 1.0),
        "transformer.transformer_blocks.1.attn.add_v_proj": Factors(
            torch.randn(2, 8), torch.zeros(8, 2), 0.0
        ),
    }
    adapter.write(tmp_path / "a.safetensors", Adapter(layers), "kohya")
    found = adapter.read(tmp_path / "a.safetensors")
    same(Adapter(layers), found, exact=False)
    assert [one.rank for one in found.layers.values()] == [
        layers[name].rank for name in found.layers
    ]
    content = load_file(tmp_path / "a.safetensors")
    assert content["lora_unet_single_blocks_0_linear1.lora_up.weight"].shape == (56, 5)


def test_the_last_modulation_is_turned_round(tmp_path):
    layers = {
        "transformer.norm_out.linear": Factors(torch.ones(1, 8), torch.arange(16.0)[:, None], 1)
    }
    adapter.write(tmp_path / "a.safetensors", Adapter(layers), "kohya")
    up = load_file(tmp_path / "a.safetensors")[
        "lora_unet_final_layer_adaLN_modulation_1.lora_up.weight"
    ]
    assert up[:, 0].tolist() == [*range(8, 16), *range(8)]
    same(Adapter(layers), adapter.read(tmp_path / "a.safetensors"))


def test_half_precision_alpha_and_settings_of_peft(tmp_path):
    down, up = torch.randn(4, 8).half(), torch.randn(8, 4).half()
    names = [f"transformer.transformer_blocks.{i}.attn.to_q" for i in range(3)]
    content = {f"{name}.lora_A.weight": down for name in names}
    content |= {f"{name}.lora_B.weight": up for name in names}
    save_file({k: v.clone() for k, v in content.items()}, tmp_path / "bare.safetensors")
    found = adapter.read(tmp_path / "bare.safetensors").layers[names[0]]
    assert (found.alpha, found.down.dtype, found.up.dtype) == (4.0, torch.float32, torch.float32)
    peft = {
        "transformer.r": 4,
        "transformer.lora_alpha": 8,
        "transformer.alpha_pattern": {"transformer_blocks.1.attn.to_q": 2},
        "transformer.use_rslora": True,
    }
    about = {"lora_adapter_metadata": json.dumps(peft), "made_by": "peft"}
    save_file({k: v.clone() for k, v in content.items()}, tmp_path / "peft.safetensors", about)
    read = adapter.read(tmp_path / "peft.safetensors")
    assert read.about == {"made_by": "peft"}
    assert [read.layers[name].scale for name in names] == [8 / 2, 2 / 2, 8 / 2]
    with_alpha = {k: v.clone() for k, v in content.items()} | {f"{names[0]}.alpha": torch.tensor(1)}
    save_file(with_alpha, tmp_path / "alpha.safetensors")
    layers = adapter.read(tmp_path / "alpha.safetensors").layers
    assert [layers[name].scale for name in names] == [1 / 4, 1, 1]


def test_text_encoders_in_both_layouts(tmp_path):
    clip = "text_encoder.encoder.layers.1.self_attn.out_proj"
    t5 = "text_encoder_2.encoder.block.3.layer.1.DenseReluDense.wi_0"
    given = random({clip: (8, 8), t5: (16, 8)})
    for layout, expected in (
        ("diffusers", "text_encoder.text_model.encoder.layers.1.self_attn.out_proj.lora_A.weight"),
        ("kohya", "lora_te1_text_model_encoder_layers_1_self_attn_out_proj.lora_down.weight"),
    ):
        adapter.write(tmp_path / "a.safetensors", given, layout)
        assert expected in load_file(tmp_path / "a.safetensors")
        same(given, adapter.read(tmp_path / "a.safetensors"))


@pytest.fixture
def pipeline(tiny_checkpoint):
    from diffusers import FluxPipeline

    return FluxPipeline.from_pretrained(tiny_checkpoint, torch_dtype=torch.float32)


def linears(pipeline) -> dict[str, tuple[int, int]]:
    return {
        f"{part}.{name}": tuple(one.weight.shape)
        for part in ("transformer", "text_encoder")
        for name, one in getattr(pipeline, part).named_modules()
        if isinstance(one, nn.Linear)
    }


def velocity(pipeline) -> Tensor:
    """The transformer's and the first text encoder's answers to fixed inputs, in one row."""
    draw = torch.Generator().manual_seed(1)
    config = pipeline.transformer.config
    with torch.no_grad():
        moved = pipeline.transformer(
            hidden_states=torch.randn(1, 4, config.in_channels, generator=draw),
            encoder_hidden_states=torch.randn(1, 3, config.joint_attention_dim, generator=draw),
            pooled_projections=torch.randn(1, config.pooled_projection_dim, generator=draw),
            timestep=torch.tensor([0.5]),
            guidance=torch.tensor([3.5]),
            img_ids=torch.zeros(4, 3),
            txt_ids=torch.zeros(3, 3),
        ).sample
        text = pipeline.text_encoder(torch.tensor([[1, 5, 9, 3]])).last_hidden_state
    return torch.cat([moved.flatten(), text.flatten()])


def add(pipeline, given: Adapter) -> None:
    for name, one in given.layers.items():
        part, _, rest = name.partition(".")
        with torch.no_grad():
            getattr(pipeline, part).get_submodule(rest).weight += one.delta()


def small(shapes: dict[str, tuple[int, int]], varied: bool) -> Adapter:
    """An adapter of small effect; `varied` in ranks and alphas."""
    draw = torch.Generator().manual_seed(2)
    layers = {}
    for number, (name, (rows, width)) in enumerate(shapes.items()):
        rank = 2 + number % 3 if varied else 2
        down, up = (torch.randn(s, generator=draw) for s in ((rank, width), (rows, rank)))
        layers[name] = Factors(down, 0.05 * up, 1.0 + number % 2 if varied else 4.0)
    return Adapter(layers)


@pytest.mark.parametrize("varied", [False, True])
def test_diffusers_opens_its_layout(pipeline, tmp_path, varied):
    before = velocity(pipeline)
    given = small(linears(pipeline), varied)
    adapter.write(tmp_path / "pytorch_lora_weights.safetensors", given)
    pipeline.load_lora_weights(tmp_path)
    loaded = velocity(pipeline)
    pipeline.unload_lora_weights()
    torch.testing.assert_close(velocity(pipeline), before)
    add(pipeline, given)
    assert (velocity(pipeline) - before).abs().max() > 0.05
    torch.testing.assert_close(loaded, velocity(pipeline), rtol=1e-4, atol=1e-5)


def test_diffusers_opens_kohyas_layout(pipeline, tmp_path):
    # diffusers knows one width of `linear1`, FLUX.1's: that layer has a test of its own below.
    shapes = {
        name: shape
        for name, shape in linears(pipeline).items()
        if ("transformer_blocks" in name and not (".single_" in name and shape[1] == 32))
        or name.startswith("text_encoder.")
    }
    before = velocity(pipeline)
    given = small(shapes, varied=False)
    assert any(name.startswith("transformer.single_transformer_blocks") for name in given.layers)
    adapter.write(tmp_path / "pytorch_lora_weights.safetensors", given, "kohya")
    pipeline.load_lora_weights(tmp_path)
    loaded = velocity(pipeline)
    pipeline.unload_lora_weights()
    add(pipeline, given)
    assert (velocity(pipeline) - before).abs().max() > 0.05
    torch.testing.assert_close(loaded, velocity(pipeline), rtol=1e-4, atol=1e-5)


def test_diffusers_splits_kohyas_single_stream_block_alike(tmp_path):
    from diffusers import FluxPipeline

    block = "transformer.single_transformer_blocks.7"
    rows = {"attn.to_q": 3072, "attn.to_k": 3072, "attn.to_v": 3072, "proj_mlp": 12288}
    given = random({f"{block}.{name}": (count, 5) for name, count in rows.items()})
    adapter.write(tmp_path / "pytorch_lora_weights.safetensors", given, "kohya")
    state = FluxPipeline.lora_state_dict(tmp_path)
    for name, one in given.layers.items():
        theirs = state[f"{name}.lora_B.weight"] @ state[f"{name}.lora_A.weight"]
        torch.testing.assert_close(theirs, one.delta())
        assert len(state[f"{name}.lora_A.weight"]) == 2


GOOD = {
    "transformer.transformer_blocks.0.attn.to_q.lora_A.weight": torch.ones(2, 8),
    "transformer.transformer_blocks.0.attn.to_q.lora_B.weight": torch.ones(8, 2),
}
KOHYA = "lora_unet_double_blocks_0_img_attn_proj"


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({"transformer.a.lora_A.weight": torch.ones(2, 8)}, "lacks transformer.a.lora_B.weight"),
        ({f"{KOHYA}.lora_up.weight": torch.ones(8, 2)}, f"lacks {KOHYA}.lora_down.weight"),
        (
            {
                "transformer.a.lora_A.weight": torch.ones(3, 8),
                "transformer.a.lora_B.weight": torch.ones(8, 2),
            },
            "ranks of transformer.a differ: .* has 3 rows, .* has 2 columns",
        ),
        ({"transformer.a.weight": torch.ones(1)}, "transformer.a.weight, which is no LoRA factor"),
        ({"unet.a.lora_A.weight": torch.ones(1, 1)}, "unet.a.lora_A.weight, which is no LoRA"),
        (
            {"lora_unet_input_blocks_1_1_proj_in.lora_up.weight": torch.ones(1, 1)},
            "lora_unet_input_blocks.* which is no LoRA factor of a FLUX.1 pipeline",
        ),
        ({f"{KOHYA}.dora_scale": torch.ones(8)}, f"{KOHYA}.dora_scale: DoRA .* train without"),
        ({"transformer.a.lora_magnitude_vector": torch.ones(8)}, "DoRA"),
        ({f"{KOHYA}.lokr_w1": torch.ones(2, 2)}, f"{KOHYA}.lokr_w1: .*plain LoRA"),
        ({f"{KOHYA}.hada_w1_a": torch.ones(2, 2)}, "LoHa"),
        ({"lora_unet_double_blocks_0_img_norm1.diff": torch.ones(2)}, "norms"),
        ({f"{KOHYA}.diff_b": torch.ones(2)}, "biases"),
        ({"transformer.a.lora_B.bias": torch.ones(2)}, "lora_bias off"),
        (
            {"double_blocks.0.processor.qkv_lora1.down.weight": torch.ones(2)},
            "another trainer's layout; convert it with diffusers",
        ),
        (
            {
                f"{KOHYA}.lora_down.weight": torch.ones(2, 8),
                f"{KOHYA}.lora_up.weight": torch.ones(8, 2),
            },
            f"mixes layouts: it has {KOHYA}",
        ),
        ({"transformer.transformer_blocks.0.attn.to_q.alpha": torch.ones(2)}, "needs one number"),
        (
            {
                "transformer.a.lora_A.weight": torch.ones(2, 8, 1, 1),
                "transformer.a.lora_B.weight": torch.ones(8, 2, 1, 1),
            },
            "linear layers only",
        ),
        (
            {
                "transformer.a.lora_A.weight": torch.ones(2, 8, dtype=torch.int8),
                "transformer.a.lora_B.weight": torch.ones(8, 2),
            },
            "is I8; use float32",
        ),
        (
            {
                "transformer.a.lora_A.weight": torch.full((2, 8), torch.nan),
                "transformer.a.lora_B.weight": torch.ones(8, 2),
            },
            "transformer.a.lora_A.weight has numbers that are not finite",
        ),
    ],
)
def test_bad_keys_are_named(tmp_path, extra, words):
    save_file(GOOD | extra, tmp_path / "a.safetensors")
    with pytest.raises(AdapterError, match=words):
        adapter.read(tmp_path / "a.safetensors")


def test_a_fused_module_of_another_width_is_refused(tmp_path):
    key = "lora_unet_single_blocks_0_linear1"
    content = {"lora_down.weight": torch.ones(2, 8), "lora_up.weight": torch.ones(50, 2)}
    save_file({f"{key}.{n}": one for n, one in content.items()}, tmp_path / "a.safetensors")
    with pytest.raises(AdapterError, match="50 rows, which cannot be shared out among .*proj_mlp"):
        adapter.read(tmp_path / "a.safetensors")


def test_files_that_are_none(tmp_path):
    file = tmp_path / "a.safetensors"
    with pytest.raises(AdapterError, match="cannot be read: No such file"):
        adapter.read(file)
    torch.save(GOOD, file)
    with pytest.raises(AdapterError, match="is a pickle"):
        adapter.read(file)
    save_file(GOOD, file)
    whole = file.read_bytes()
    for length in (0, 5, 40, len(whole) - 1):
        file.write_bytes(whole[:length])
        with pytest.raises(AdapterError, match="cut|no safetensors"):
            adapter.read(file)
    save_file({}, file)
    with pytest.raises(AdapterError, match="no tensors"):
        adapter.read(file)
    save_file(GOOD, file, {"lora_adapter_metadata": "{"})
    with pytest.raises(AdapterError, match="its metadata cannot be used"):
        adapter.read(file)


def test_layers_that_a_layout_cannot_name(tmp_path):
    odd = Adapter({"transformer.extra": Factors(torch.ones(1, 2), torch.ones(2, 1), 1.0)})
    with pytest.raises(AdapterError, match="no name for transformer.extra"):
        adapter.write(tmp_path / "a.safetensors", odd, "kohya")
    with pytest.raises(AdapterError, match="unet.a is no layer of"):
        adapter.write(
            tmp_path / "a.safetensors", Adapter({"unet.a": odd.layers["transformer.extra"]})
        )
    with pytest.raises(AdapterError, match="layout 'other' is not known"):
        adapter.write(tmp_path / "a.safetensors", odd, "other")
    assert not list(Path(tmp_path).iterdir())


@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
@pytest.mark.parametrize("text", ["[]", '["transformer.lora_alpha"]', "3", "[" * 100_000])
def test_settings_that_are_no_object_are_refused(tmp_path, layout, text):
    layers = {"transformer.proj_out": Factors(torch.ones(1, 2), torch.ones(2, 1), 1.0)}
    file = tmp_path / "a.safetensors"
    adapter.write(file, Adapter(layers), layout)
    key = {"diffusers": "lora_adapter_metadata", "kohya": "dermaflux.ranks"}[layout]
    save_file(load_file(file), file, {key: text})
    words = "an object of settings is needed" if len(text) < 99 else "recursion"
    with pytest.raises(AdapterError, match=f"its metadata cannot be used: .*{words}"):
        adapter.read(file)


def test_an_alpha_that_is_no_number_is_refused(tmp_path):
    file = tmp_path / "a.safetensors"
    save_file(GOOD, file, {"lora_adapter_metadata": '{"transformer.lora_alpha": NaN}'})
    with pytest.raises(AdapterError, match="an alpha of nan"):
        adapter.read(file)


@pytest.mark.parametrize(
    ("header", "words"),
    [
        (b"[" * 100_000, "its header is no JSON"),
        (b"[1]", "not the object of tensors"),
        (b'{"a": []}', "not the object of tensors"),
        (b'{"__metadata__": []}', "not the object of tensors"),
    ],
)
def test_headers_that_are_none_are_told_plainly(tmp_path, header, words):
    file = tmp_path / "a.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(AdapterError, match=words) as refused:
        adapter.read(file)
    assert "Error(" not in str(refused.value)


@pytest.mark.parametrize("length", [640, 1152, 19280])
def test_a_header_as_long_as_a_pickle_begins_is_none(tmp_path, length):
    file = tmp_path / "a.safetensors"
    save_file(GOOD, file)
    whole = file.read_bytes()
    old = int.from_bytes(whole[:8], "little")
    header = whole[8 : 8 + old].ljust(length)
    file.write_bytes(length.to_bytes(8, "little") + header + whole[8 + old :])
    assert file.read_bytes()[:2] in (b"PK", b"\x80\x02", b"\x80\x04")
    assert load_file(file).keys() == GOOD.keys()
    assert adapter.read(file).layers
