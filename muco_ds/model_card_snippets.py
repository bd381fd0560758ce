"""What a model card says about using the model. Words in capitals are filled in by muco_ds.model_card."""

from __future__ import annotations

SNIPPETS = """## Use

Three ways to the same vectorsSAME. Run in this folder, or put its path in place of the dot.
Pictures with a side under 28 px are the exception: muco_ds makes them 56 x 56 first, as in training, the others do not.

### muco_ds

```python
from PIL import Image
from muco_ds import Embedder

picture = Image.new("RGB", (112, 112), "red")
embedder = Embedder.from_pretrained(".")
items = ["a red square", picture, {"image": picture, "text": "Which colour is it?"}]
embeddings = embedder.encode(items)  # float32 [3, WIDTH]
```

### sentence-transformers

```python
from PIL import Image
from sentence_transformers import SentenceTransformer

picture = Image.new("RGB", (112, 112), "red")
model = SentenceTransformer("."TRUST)
items = ["a red square", picture, {"image": picture, "text": "Which colour is it?"}]
embeddings = model.encode(items)
```

### transformers

The chat template ends at what is pooled, PLACE.

```python
import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor

processor = AutoProcessor.from_pretrained(".")
model = AutoModel.from_pretrained(".").eval()


def embed(*content):
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": list(content)}], tokenize=True, return_dict=True, return_tensors="pt"
    )
    with torch.no_grad():
        states = model(**inputs).last_hidden_state[0].float()
    return torch.nn.functional.normalize(statesPOOLED, dim=0)


picture = {"type": "image", "image": Image.new("RGB", (112, 112), "red")}
text, question = ({"type": "text", "text": text} for text in ("a red square", "Which colour is it?"))
embeddings = torch.stack([embed(text), embed(picture), embed(picture, question)])
```
"""

ADAPTED = """## Use

This is an adapter: its backbone's folder belongs to it, and must be the one it was trained on.

```py
from muco_ds import Embedder

embedder = Embedder.from_pretrained(".", base="FOLDER_OF_THE_BACKBONE")
embeddings = embedder.encode(["a red square", {"image": "picture.png", "text": "Which colour is it?"}])
```

`peft.PeftModel.from_pretrained(AutoModel.from_pretrained("FOLDER_OF_THE_BACKBONE"), ".")` loads it, too.
"""

COMPRESSION = """## Embeddings of TOKENS compression tokens

The embedding of a text, a picture or both is the mean of the states of the TOKENS tokens that the chat template
puts behind them (CoMa, arXiv 2511.08480), at unit length.

sentence-transformers has no such pooling, so it stands in `compression_pooling.py` in this folder. Without
`trust_remote_code=True` the model is refused: it "references the module class 'compression_pooling.CompressionPooling',
which is not part of Sentence Transformers".
"""

MATRYOSHKA = """## Sizes of the embeddings

Trained as Matryoshka embeddings (arXiv 2205.13147) of SIZES components: cut to one of these
sizes they are embeddings as well. The two give the same vectors:

```py
SentenceTransformer(".", truncate_dim=SMALLESTTRUST).encode(items, normalize_embeddings=True)
Embedder.from_pretrained(".").encode(items, dim=SMALLEST)
```

Without `normalize_embeddings=True` sentence-transformers gives the leading components of the whole embedding, which are
shorter than unit length: cosines, as of `SentenceTransformer.similarity`, are the same, inner products are not.
"""

PICTURES = """## Sizes of pictures

Training resized each picture's short side to SIDE px first. Stock processors can't: with sentence-transformers and
transformers do it before, or pictures are seen at other sizes. `muco_ds.Embedder` does it by itself.
"""
