"""Which layers are recomputed, which tower's first, and the least that fits."""

from __future__ import annotations

from itertools import pairwise

import pytest
from test_memory import released

from muco_ds.config_activations import ActivationCheckpointing
from muco_ds.sizing import choices, least, overrides

QWEN2_VL_2B, QWEN2_VL_7B = (1536, 28, 12, 2, 8960), (3584, 28, 28, 4, 18944)


def test_shares_name_numbers_of_layers() -> None:
    for layers in (2, 3, 24, 28, 32, 36, 64, 80, 99):
        for n in range(layers):
            made = ActivationCheckpointing.of_layers(n, layers, n, layers)
            assert (made.text_layers(layers), made.vision_layers(layers)) == (n, n)
    everything = ActivationCheckpointing()
    assert (everything.text_layers(28), everything.vision_layers(32)) == (27, 32), "all, but not the last text layer"
    assert ActivationCheckpointing(0.5, 0.0).vision_layers(32) == 0
    assert ActivationCheckpointing(0.55).text_layers(20) == 11, "0.55 * 20 is above 11 in floating point"


@pytest.mark.parametrize("shape", [QWEN2_VL_2B, QWEN2_VL_7B])
def test_choices_go_from_what_there_is_to_everything_layer_by_layer(shape: tuple[int, int, int, int, int]) -> None:
    backbone = released(*shape)
    found = choices(ActivationCheckpointing(0.5, 0.0), backbone, freeze_vision=False)
    counts = [(choice.text_layers(28), choice.vision_layers(32)) for choice in found]
    assert counts[0] == (14, 0) and counts[-1] == (27, 32)
    assert all(sum(more) == sum(fewer) + 1 for fewer, more in pairwise(counts))
    assert counts[1] == (14, 1), "a vision layer gives as much for its compute as a text layer in 2B, and more in 7B"


def test_a_frozen_tower_has_no_choices() -> None:
    found = choices(ActivationCheckpointing(0.0), released(*QWEN2_VL_2B), freeze_vision=True)
    assert len(found) == 28 and {choice.vision for choice in found} == {None}
    assert overrides(found[-1]) == {"model.activation_checkpointing.text": 1.0}


def test_the_least_that_fits() -> None:
    found = choices(ActivationCheckpointing(0.0), released(*QWEN2_VL_2B), freeze_vision=True)

    def total(choice: ActivationCheckpointing) -> int:
        return 1000 - 10 * choice.text_layers(28)

    assert least(found, total, 1000) == found[0]
    assert least(found, total, 900) == found[10]
    assert least(found, total, 895) == found[11]
    assert least(found, total, 100) is None
