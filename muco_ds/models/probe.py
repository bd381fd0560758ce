"""A few fixed items whose embeddings prove that a model is still the same after saving, converting and loading."""

from __future__ import annotations

import numpy as np
from PIL import Image

from muco_ds.data.schema import Dialogue


def probe_dialogues() -> list[Dialogue]:
    """Text alone, a picture alone, both, and two turns about one picture: five embeddings."""
    ramp = np.linspace(0, 255, 112, dtype=np.uint8)
    across, down = np.tile(ramp, (84, 1)), np.tile(ramp[:84, None], (1, 112))
    pixels = np.stack([across, down, np.full_like(across, 96)], -1)
    picture = Image.fromarray(pixels)
    return [
        Dialogue(("A lighthouse on a cliff, seen from the sea.",)),
        Dialogue(("",), (picture,)),
        Dialogue(("Which colours meet in this picture?",), (picture,)),
        Dialogue(("What is in the corner?", "Describe the picture."), (picture.transpose(Image.Transpose.ROTATE_90),)),
    ]
