"""A tiny Qwen2-VL with random weights, its own byte-level BPE tokenizer, chat template and image processor file.

The folder is laid out like a released Qwen2-VL checkpoint: `Qwen2VLForConditionalGeneration` with tied embeddings,
Qwen's special tokens after the BPE tokens, and spare vocabulary rows after those.
"""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.processors import ByteLevel as ByteLevelProcessor
from tokenizers.trainers import BpeTrainer
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from muco_ds.data.demo_scenes import row_texts, write_data
from muco_ds.errors import UserError

# Raise it when anything below or in demo_scenes changes what is written: demos of an older version are then rebuilt.
DEMO_VERSION = 4
STAMP = "demo.json"

BPE_TOKENS = 888
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
# 64 embedding rows more than the tokenizer has tokens: released Qwen2-VL checkpoints have spare rows too (279).
VOCAB_ROWS = BPE_TOKENS + len(SPECIAL_TOKENS) + 64
# Fewer do not hold enough distinct texts for BPE_TOKENS tokens.
MIN_SCENES = 16
PATCH = 14
TEMPORAL_PATCH = 2
MERGE = 2

# Without ordinary English in the training text a caption from outside the demo would take one token per letter or two.
ENGLISH = """
The people of the town walk to the market every morning, and many of them come back with bread, fruit and flowers.
A man in a dark coat is standing at the corner of the street, waiting for the next bus to the station.
Two children are playing with a small dog in the park while their mother reads a book on the bench.
This photograph was taken from the window of a train as it was crossing the bridge over the river.
What is the name of the building that you can see behind the trees on the other side of the water?
She has been working in the same office for more than ten years, but she would rather be painting.
There was nothing on the table except an old clock, a glass of water and a letter that nobody had opened.
How many people are there in the picture, and what are they doing with their hands?
The weather was cold and the wind came from the north, so we stayed inside and listened to the radio.
It is not easy to explain how the machine works, because most of its parts are hidden under the cover.
A group of young women in white shirts is running along the beach in front of a large hotel.
The first chapter describes the history of the country before the war and the changes that followed it.
Please give a short description of the scene, then answer the question in one or two words.
On the left side of the image there is a wooden door, and on the right side there is a metal gate.
If you want to learn a new language, you should listen, read and speak a little every day.
The cat was sleeping on the chair by the fire when the door opened and the cold air came in.
Most of the houses in this village were built of stone and have red roofs and green gardens.
He said that he could not remember where he had left his keys, his phone or his yellow umbrella.
A plate of food with rice, vegetables and a piece of chicken is served on a blue table cloth.
The company announced that it would open three more stores in the city before the end of the year.
An airplane is flying over the mountains, leaving a long white line in the clear sky behind it.
During the summer the lake is full of boats, and in the winter people come here to skate on the ice.
Which of these objects is used to cut paper, and which one is used to measure the length of a line?
The teacher drew a map on the board and asked the students to find the capital of each state.
I have never seen so many stars in the night sky as I saw that evening in the desert.
Several bottles and cups are standing on the kitchen counter next to the sink and the window.
The player in the orange jersey is about to throw the ball to another member of his team.
Although the road was long and dark, they were glad to be together and talked about the future.
The sign above the entrance says that the museum is closed on Monday and open from nine to five on other days.
A black and white photo of an old car parked in front of a shop, with a bicycle leaning against the wall.
Could you tell me whether this bird is flying, swimming or sitting on a branch of the tree?
They have two sons and a daughter, who all live within an hour of the house in which they were born.
The results show that the number of visitors has grown since the new road was finished last spring.
Large waves are breaking on the rocks below the lighthouse while dark clouds gather over the sea.
My grandfather used to keep his tools in a box under the stairs, each one in its own place.
The woman on the phone is looking at a computer screen and holding a pen in her right hand.
Every group of numbers in the second column must be added together before the final result is written down.
Some animals sleep during the day and hunt at night; others do the opposite, and a few hardly sleep at all.
A street at night with bright lights, signs in several languages and crowds of people crossing the road.
The doctor thought that it was probably nothing serious, but she wanted to see him again after a week.
"""

# Qwen2-VL's template: images are written where they stand in the content, a system message is added when there is none.
CHAT_TEMPLATE = (
    "{% set image_count = namespace(value=0) %}{% set video_count = namespace(value=0) %}"
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n"
    "{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
    "{% set image_count.value = image_count.value + 1 %}"
    "{% if add_vision_id %}Picture {{ image_count.value }}: {% endif %}"
    "<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif content['type'] == 'video' or 'video' in content %}"
    "{% set video_count.value = video_count.value + 1 %}"
    "{% if add_vision_id %}Video {{ video_count.value }}: {% endif %}"
    "<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

IMAGE_PROCESSOR = {
    "image_processor_type": "Qwen2VLImageProcessor",
    "processor_class": "Qwen2VLProcessor",
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "resample": 3,
    "rescale_factor": 1 / 255,
    "size": {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280},
    "patch_size": PATCH,
    "temporal_patch_size": TEMPORAL_PATCH,
    "merge_size": MERGE,
}


def build_demo(out: Path, scenes: int, test_scenes: int, seed: int) -> bool:
    """Write `out/model` and `out/data`; False if `out` holds the finished demo of the same arguments already.

    A function of the arguments alone. An earlier demo of other arguments, or one that was cut short, is replaced.

    Raises:
        UserError: a number of scenes that cannot be drawn or trained on, or `out` holds something that is not a demo.
    """
    if scenes < MIN_SCENES:
        raise UserError(f"--scenes {scenes}: the tokenizer needs the texts of at least {MIN_SCENES} scenes")
    if test_scenes < 1:
        raise UserError(f"--test_scenes {test_scenes}: give at least 1")
    stamp = out / STAMP
    wanted = {"version": DEMO_VERSION, "scenes": scenes, "test_scenes": test_scenes, "seed": seed}
    if stamp.is_file():
        found = json.loads(stamp.read_text(encoding="utf-8"))
        if found == {**wanted, "complete": True}:
            return False
        for folder in ("model", "data"):
            shutil.rmtree(out / folder, ignore_errors=True)
    elif (out / "model").exists() or (out / "data").exists():
        raise UserError(f"{out}: holds a model or data folder without {STAMP}, so not a demo; choose another folder")
    out.mkdir(parents=True, exist_ok=True)
    # The first stamp marks the folders as ours to remove after a crash, the last one marks them as finished.
    _write_json(stamp, {**wanted, "complete": False})
    train_rows = write_data(out / "data", scenes, test_scenes, seed)
    write_model(out / "model", row_texts(train_rows), seed)
    _write_json(stamp, {**wanted, "complete": True})
    return True


def train_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """Byte-level BPE with Qwen2's normaliser and pre-tokenizer: `BPE_TOKENS` tokens, then `SPECIAL_TOKENS`.

    All 256 bytes are tokens, so any text round-trips (in Unicode's NFC form).
    """
    tokenizer = Tokenizer(BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = ByteLevelProcessor(add_prefix_space=False, use_regex=False, trim_offsets=False)
    prompt_words = "system\nYou are a helpful assistant.\nuser\nassistant\n"
    trainer = BpeTrainer(
        vocab_size=BPE_TOKENS, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    tokenizer.train_from_iterator([*ENGLISH.strip().split("\n"), *[prompt_words] * 100, *texts], trainer)
    assert tokenizer.get_vocab_size() == BPE_TOKENS, "the training text is too short for the vocabulary"
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return tokenizer


def tokenizer_config(tokenizer: Tokenizer) -> dict[str, Any]:
    """The content of tokenizer_config.json, as in Qwen2-VL's release."""
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    return {
        "tokenizer_class": "Qwen2Tokenizer",
        "add_prefix_space": False,
        "added_tokens_decoder": {
            str(tokenizer.token_to_id(token)): {"content": token, **flags} for token in SPECIAL_TOKENS
        },
        "additional_special_tokens": list(SPECIAL_TOKENS[1:]),
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": 32768,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "unk_token": None,
    }


def model_config(tokenizer: Tokenizer) -> Qwen2VLConfig:
    """The tiny model's shape: about 0.7M parameters, one visual token per 28 x 28 pixels."""
    ids = tokenizer.get_vocab()
    hidden = 96
    text_config = {
        "vocab_size": VOCAB_ROWS,
        "hidden_size": hidden,
        "intermediate_size": 256,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "initializer_range": 0.05,
        # 12 frequencies of a head of 24: time, height, width.
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 4, 4]},
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
        "tie_word_embeddings": True,
    }
    vision_config = {
        "depth": 3,
        "embed_dim": 64,
        "hidden_size": hidden,
        "mlp_ratio": 4,
        "num_heads": 4,
        "patch_size": PATCH,
        "spatial_merge_size": MERGE,
        "temporal_patch_size": TEMPORAL_PATCH,
        "rope_parameters": {"rope_type": "axial", "rope_theta": 10.0},
        "initializer_range": 0.05,
    }
    return Qwen2VLConfig(
        text_config=text_config,
        vision_config=vision_config,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
    )


def write_model(model_dir: Path, texts: Iterable[str], seed: int) -> None:
    """Write the whole model folder (fp32 safetensors, config, tokenizer, chat template, image processor).

    `texts` trains the tokenizer, `seed` draws the weights; the same arguments give the same files.
    """
    model_dir.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(texts)
    tokenizer.save(str(model_dir / "tokenizer.json"))
    _write_json(model_dir / "tokenizer_config.json", tokenizer_config(tokenizer))
    _write_json(model_dir / "preprocessor_config.json", IMAGE_PROCESSOR)
    (model_dir / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2VLForConditionalGeneration(model_config(tokenizer))
    model.save_pretrained(model_dir)
    # Written for models that can generate; this one is only for embeddings, and its defaults would say nothing.
    (model_dir / "generation_config.json").unlink(missing_ok=True)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
