"""Prints as JSON how far SentenceTransformer and stock transformers are from Embedder, a line each: `python ... MODEL`.

A program of its own because torchvision must be prepared before transformers is imported.
"""

import json
import re
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import numpy as np
import torch

from torchvision_operators import prepare_torchvision


def main() -> None:
    libraries = prepare_torchvision()  # must stay alive
    for path in sys.argv[1:]:
        print(json.dumps(compare(path)))
    del libraries


def compare(path: str) -> dict[str, object]:
    from PIL import Image
    from sentence_transformers import SentenceTransformer
    from transformers import AutoProcessor

    from muco_ds import Embedder
    from muco_ds.data.schema import QUERY, Dialogue, Side

    rng = np.random.default_rng(0)

    def picture(width: int, height: int) -> Image.Image:
        return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))

    embedder = Embedder.from_pretrained(path, device="cpu", dtype=torch.float32)
    # A compressed model brings its own pooling module.
    model = SentenceTransformer(path, device="cpu", local_files_only=True, trust_remote_code=True)
    assert embedder.packer is not None
    side = embedder.packer.images.factor
    # Whole tokens within the model's limits: these sizes are not resized.
    a, b, c = picture(3 * side, 3 * side), picture(2 * side, 4 * side), picture(2 * side, 2 * side)
    batches: dict[str, list] = {
        "texts": ["Where is the red circle?", "x", "  In the top left corner,\nbelow the green one.  "],
        "pictures": [a, b, c],
        "both": [{"image": a, "text": "Which shape is it?"}, {"text": "How many are there?", "image": b}],
        "long text": [" ".join(f"word {i}," for i in range(700))],
        "several pictures": [{"image": [a, b], "text": "Which one is larger?"}, {"image": [c, a]}],
        "mixed": ["A blue square.", {"image": c, "text": "What is this?"}, b, "No."],
    }
    result = {name: difference(model.encode(items), embedder.encode(items)) for name, items in batches.items()}
    # What only Embedder takes, beside the same in other words.
    told = [{"text": "Find its name.\nWhere?"}, {"image": a, "text": "Find its name.\nWhere?"}]
    items = ["Where?", {"text": "Where?", "image": a}]
    result["instruction"] = difference(model.encode(told), embedder.encode(items, instruction="Find its name."))
    result["array"] = difference(model.encode([a, b]), embedder.encode([np.asarray(a), {"image": [np.asarray(b)]}]))
    result["turns"] = difference(model.encode(batches["both"][:1]), embedder.encode_turns(a, ["Which shape is it?"]))
    if side == 28:  # 56 x 56, as which a tiny picture enters, is not resized again
        tiny = picture(20, 40)
        by_hand = tiny.resize((56, 56), Image.Resampling.BICUBIC)
        result["tiny picture"] = difference(model.encode([by_hand]), embedder.encode([tiny]))
    resized = [picture(150, 210), picture(300, 90), picture(20, 40)]
    result["resized"] = difference(model.encode(resized[:2]), embedder.encode(resized[:2]))

    processor = AutoProcessor.from_pretrained(path, local_files_only=True)
    whole = [item for items in batches.values() for item in items]
    stock_ND = stock_embeddings(path, processor, whole, len(embedder.packer.template.pooled_ids))
    result["transformers"] = difference(stock_ND, embedder.encode(whole))
    result |= card_differences(path)
    ids_equal = []
    for pictures, text in (([], "Where?"), ([a], ""), ([b], "What is it?"), ([a, resized[0]], "Which?")):
        content = [{"type": "text", "text": text}, *({"type": "image", "image": image} for image in pictures)]
        prompt = processor.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=True, return_dict=True, return_tensors="np"
        )
        asked = Side(QUERY, Dialogue((text,), tuple(pictures)), history=False, ids_k3=np.zeros((1, 3), np.int64))
        ids_equal.append(
            prompt["input_ids"][0].tolist() == embedder.packer.pack([asked], replace_broken=False).input_ids_T.tolist()
        )
    return {"differences": result, "ids_equal": ids_equal, "limit": model.max_seq_length}


def stock_embeddings(path, processor, items, pooled: int):  # type: ignore[no-untyped-def]
    """Mean of the last `pooled` states of each prompt by the stock model, [N, D]."""
    from PIL import Image
    from transformers import AutoModel

    model = AutoModel.from_pretrained(path, dtype=torch.float32).eval()
    rows = []
    for item in items:
        item = item if isinstance(item, dict) else {"image" if isinstance(item, Image.Image) else "text": item}
        images = item.get("image", [])
        content = [{"type": "text", "text": item["text"]}] if "text" in item else []
        content += [{"type": "image", "image": one} for one in (images if isinstance(images, list) else [images])]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=True, return_dict=True, return_tensors="pt"
        )
        with torch.no_grad():
            rows.append(model(**inputs).last_hidden_state[0, -pooled:].mean(0))
    return torch.nn.functional.normalize(torch.stack(rows), dim=1).numpy()


def card_differences(path: str) -> dict[str, float]:
    """What the model card's programs make, run in the folder, against the first one's."""
    import os

    card = (Path(path) / "README.md").read_text()
    found = []
    here = os.getcwd()
    os.chdir(path)
    for program in re.findall(r"^```python\n(.*?)^```", card, re.MULTILINE | re.DOTALL):
        names: dict[str, object] = {}
        exec(program, names)
        found.append(np.asarray(names["embeddings"]))
    os.chdir(here)
    assert len(found) == 3, "the card has a program each for Embedder, sentence-transformers and transformers"
    return {f"program {i} of the card": difference(found[0], other) for i, other in enumerate(found[1:], 1)}


def difference(one_ND: np.ndarray, other_ND: np.ndarray) -> float:
    assert one_ND.shape == other_ND.shape
    return float(abs(one_ND - other_ND).max())


if __name__ == "__main__":
    main()
