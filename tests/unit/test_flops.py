"""FLOPs against numbers worked out by hand."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModel, Qwen2_5_VLConfig, Qwen2VLConfig

from muco_ds.config_lora import LoraOptions
from muco_ds.flops import FlopsModel, peak_flops

from demo import Demo
from tiny_folders import KINDS
from tiny_models import model_folder

VISION = {"depth": 32, "embed_dim": 1280, "mlp_ratio": 4, "num_heads": 16}


def released(hidden: int, layers: int, heads: int, kv_heads: int, intermediate: int) -> FlopsModel:
    text = {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": intermediate,
    }
    config = Qwen2VLConfig(text_config=text, vision_config={**VISION, "hidden_size": hidden})
    return FlopsModel.from_config(config, train_vision=False)


def test_the_tiny_model_by_hand(demo: Demo) -> None:
    flops = demo.flops()
    # Text: 3 layers, hidden 96, 4 query and 2 key/value heads of 24, intermediate 256.
    assert flops.per_token == 2 * 3 * (96 * 96 * 2 + 96 * 48 * 2 + 3 * 96 * 256)
    assert flops.per_token_pair == 2 * 4 * 96  # the last layer is asked for few rows
    assert flops.per_unread == 2 * (96 * 96 * 2 + 3 * 96 * 256)
    # Vision: 3 layers of width 64 with a fourfold MLP; patches of 3 x 2 x 14 x 14; merger 256 -> 256 -> 96 per four.
    assert flops.per_patch == 2 * (1176 * 64 + 3 * (4 * 64**2 + 2 * 64 * 256) + (256 * 256 + 256 * 96) / 4)
    assert flops.per_patch_pair == 3 * 4 * 64


@pytest.mark.parametrize("kind", KINDS)
def test_every_weight_matrix_of_the_tiny_models_is_counted(kind: str) -> None:
    """Two FLOPs per weight: an oracle that reads the model instead of its configuration."""
    config = AutoConfig.from_pretrained(model_folder(kind))
    model = AutoModel.from_config(config)

    def weights(*parts: str) -> int:
        named = [(name, p) for name, p in model.named_parameters() if p.ndim > 1 and "pos_embed" not in name]
        return sum(p.numel() for name, p in named if all(part in name for part in parts))

    flops = FlopsModel.from_config(config, train_vision=True)
    assert flops.per_token == 2 * weights("language_model.layers")
    mergers = weights("visual.", "merger")
    windows = 2 * 4 * 64 * 16 if kind == "qwen2_5_vl" else 0  # layers, width, patches of a window
    assert flops.per_patch - windows == 2 * (weights("visual.") - mergers + mergers / 4)


def test_the_tiny_qwen3_vl_by_hand() -> None:
    flops = FlopsModel.from_config(AutoConfig.from_pretrained(model_folder("qwen3_vl")), train_vision=True)
    # Text: 3 layers, hidden 96, 4 query and 2 key/value heads of 32, intermediate 256.
    assert flops.per_token == 2 * 3 * (96 * 128 * 2 + 96 * 64 * 2 + 3 * 96 * 256)
    assert flops.per_token_pair == 2 * 4 * 128
    # Vision: 3 layers of width 64 with an MLP of 112; patches of 3 x 2 x 16 x 16; 3 mergers 256 -> 256 -> 96 per four.
    assert flops.per_patch == 2 * (1536 * 64 + 3 * (4 * 64**2 + 2 * 64 * 112) + 3 * (256 * 256 + 256 * 96) / 4)
    assert flops.per_patch_pair == 3 * 4 * 64


@pytest.mark.parametrize(
    "shape, billions",
    [((1536, 28, 12, 2, 8960), 1.31), ((3584, 28, 28, 4, 18944), 6.53)],
    ids=["2B", "7B"],
)
def test_released_sizes(shape: tuple[int, int, int, int, int], billions: float) -> None:
    flops = released(*shape)
    assert flops.per_token / 2 == pytest.approx(billions * 1e9, rel=0.005)
    assert flops.per_token_pair == 4 * shape[0] * 27
    patches = 4 * 1280  # a picture of 1280 tokens: 6.4 TFLOP in the vision tower's matrices, 4.3 in its attention
    linear = flops.per_patch - 2 * ((5120**2 + 5120 * shape[0]) / 4)  # without the merger
    assert linear * patches == pytest.approx(6.4e12, rel=0.01)
    assert flops.per_patch_pair * patches**2 == pytest.approx(4.3e12, rel=0.01)


def test_windows_make_most_layers_linear() -> None:
    text = {"hidden_size": 2048, "num_hidden_layers": 36, "num_attention_heads": 16, "intermediate_size": 11008}
    vision = {
        "depth": 32,
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "out_hidden_size": 2048,
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
    }
    flops = FlopsModel.from_config(Qwen2_5_VLConfig(text_config=text, vision_config=vision), train_vision=False)
    assert flops.per_patch_pair == 4 * 1280 * 4
    attention_in_windows = 28 * 4 * 1280 * 64
    layers = 32 * (4 * 1280**2 + 3 * 1280 * 3420)
    assert flops.per_patch == 2 * (1176 * 1280 + layers + (5120**2 + 5120 * 2048) / 4) + attention_in_windows


def test_training_counts_a_backward_only_where_there_is_one() -> None:
    flops = FlopsModel(per_token=5, per_token_pair=3, per_patch=7, per_patch_pair=2, train_vision=True)
    assert flops.training(10, 100, 20, 400) == 3 * (50 + 300) + 3 * (140 + 800)
    frozen = FlopsModel(per_token=5, per_token_pair=3, per_patch=7, per_patch_pair=2, train_vision=False)
    assert frozen.training(10, 100, 20, 400) == 3 * (50 + 300) + (140 + 800)


@pytest.mark.parametrize("lora", [None, LoraOptions(rank=4, targets="all"), LoraOptions(rank=4, targets="attention")])
@pytest.mark.parametrize("kind", KINDS)
def test_the_last_layer_is_spared_its_work_on_rows_that_are_not_read(kind: str, lora: LoraOptions | None) -> None:
    """Two FLOPs per weight and row, of all but what makes keys and values; beside an adapter that has two matrices."""
    config = AutoConfig.from_pretrained(model_folder(kind))
    flops = FlopsModel.from_config(config, train_vision=False, lora=lora)
    with torch.device("meta"):
        layer = AutoModel.from_config(config).language_model.layers[-1]
    spared = {n: m for n, m in layer.named_modules() if isinstance(m, torch.nn.Linear) and n[-6:-5] not in "kv"}
    assert len(spared) == 5
    frozen = sum(2 * m.weight.numel() for m in spared.values()) * (3 if lora is None else 2)
    adapted = [m for n, m in spared.items() if lora is not None and (lora.targets == "all" or "attn" in n)]
    small = sum(3 * 2 * 4 * (m.in_features + m.out_features) for m in adapted)
    assert flops.training(10, 0, 0, 0) - flops.training(10, 0, 0, 0, read=3) == pytest.approx(7 * (frozen + small))


@pytest.mark.parametrize("kind", KINDS)
def test_beside_an_adapter_no_weight_has_a_gradient(kind: str) -> None:
    config = AutoConfig.from_pretrained(model_folder(kind))
    full = FlopsModel.from_config(config, train_vision=True)
    lora = FlopsModel.from_config(config, train_vision=True, lora=LoraOptions(rank=4, targets="all"))
    with torch.device("meta"):
        model = AutoModel.from_config(config)

    def small(tower: str) -> int:
        layers = [m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and tower in n]
        return sum(4 * (layer.in_features + layer.out_features) for layer in layers)

    merged = small("merger")
    text = 2 * full.per_token * 10 + 3 * full.per_token_pair * 100 + 6 * small("language_model") * 10
    assert lora.training(10, 100, 0, 0) == pytest.approx(text)
    by_patch = small("visual") - merged + merged / 4
    vision = 2 * full.per_patch * 20 + 3 * full.per_patch_pair * 400 + 6 * by_patch * 20
    assert lora.training(0, 0, 20, 400) == pytest.approx(vision)
    tokens = FlopsModel.from_config(config, train_vision=False, lora=LoraOptions(rank=4, targets="tokens"))
    assert tokens.training(10, 100, 0, 0) == pytest.approx(text - 6 * small("language_model") * 10)
    attention = FlopsModel.from_config(config, train_vision=False, lora=LoraOptions(rank=4, targets="attention"))
    others = small("language_model") - small("self_attn")
    assert attention.training(10, 100, 0, 0) == pytest.approx(text - 6 * others * 10)
    frozen = FlopsModel.from_config(config, train_vision=False, lora=LoraOptions(rank=4))
    assert frozen.training(0, 0, 20, 400) == full.per_patch * 20 + full.per_patch_pair * 400


@pytest.mark.parametrize(
    "name, peak",
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA A10", 125e12),
        ("NVIDIA A10G", None),
        ("NVIDIA L40", None),
        ("Tesla T4", None),
    ],
)
def test_peaks_by_device_name(name: str, peak: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda")) == peak


def test_a_cpu_has_no_peak() -> None:
    assert peak_flops(torch.device("cpu")) is None
