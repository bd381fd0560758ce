"""What stands beside the weights of an embedding model: tokenizer, image settings, how to pool.

Written into every checkpoint, from where the exporter copies it, so that a checkpoint can be converted without the run.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path

from transformers import PretrainedConfig, PreTrainedTokenizerFast
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from muco_ds.config import RunConfig
from muco_ds.config_matryoshka import check_sizes, sizes_of
from muco_ds.data.collator import Packer
from muco_ds.data.images import ImageLimits, ImagePipeline
from muco_ds.data.templates import ChatTemplate, TemplateName
from muco_ds.data.vision import VisionLayout
from muco_ds.errors import UserError
from muco_ds.models.backbones import load_config, load_image_processor, load_tokenizer

SETTINGS_FILE = "muco_ds.json"


@dataclass(frozen=True)
class Settings:
    """How a model was trained to embed; inference must do the same.

    `matryoshka`: the sizes that it was trained for, ascending, the whole embedding's last; empty: that one alone.
    """

    pool_token: str
    min_pixels: int
    max_pixels: int
    short_side: int | None
    matryoshka: list[int] = field(default_factory=list)
    compression_tokens: int = 0
    template: TemplateName = "chat"

    @classmethod
    def of_run(cls, config: RunConfig, width: int) -> Settings:
        """`width`: of the whole embedding. Raises UserError where `loss.matryoshka` holds a larger size."""
        sizes = sizes_of(config.loss.matryoshka, width)
        model, data = config.model, config.data
        return cls(
            pool_token=model.pool_token,
            min_pixels=data.min_pixels,
            max_pixels=data.max_pixels,
            short_side=data.short_side,
            matryoshka=sizes if len(sizes) > 1 else [],
            compression_tokens=model.compression_tokens,
            template=model.template,
        )

    @property
    def limits(self) -> ImageLimits:
        return ImageLimits(self.min_pixels, self.max_pixels, self.short_side)


@dataclass(frozen=True)
class Processing:
    """Tokenizer, image processor and settings of one model folder."""

    tokenizer: PreTrainedTokenizerFast
    image_processor: Qwen2VLImageProcessorPil
    settings: Settings
    path: str

    @classmethod
    def load(cls, path: str, settings: Settings, *, masks: bool = False) -> Processing:
        """From a backbone folder (new tokens are added, see `load_tokenizer`) or from one of our own."""
        tokenizer = load_tokenizer(path, settings.pool_token, masks=masks, compression=settings.compression_tokens)
        return cls(tokenizer, load_image_processor(path), settings, path)

    def packer(self, backbone: PretrainedConfig | None = None) -> Packer:
        """`backbone`: configuration of the model, where it is not the folder's own (an adapter has none)."""
        settings, vision = self.settings, VisionLayout(backbone or load_config(self.path))
        template = ChatTemplate(
            self.tokenizer,
            settings.pool_token,
            compression_tokens=settings.compression_tokens,
            template=settings.template,
        )
        return Packer(template, ImagePipeline(self.image_processor, settings.limits), vision)

    def save(self, path: Path, config: PretrainedConfig) -> None:
        """Write everything but the weights."""
        path.mkdir(parents=True, exist_ok=True)
        config.save_pretrained(path)
        self.tokenizer.save_pretrained(path)
        self.image_processor.save_pretrained(path)
        (path / SETTINGS_FILE).write_text(json.dumps(asdict(self.settings), indent=2) + "\n")


def read_settings(path: str) -> Settings:
    """Settings of an exported model folder. Raises UserError for a folder that holds none."""
    file = os.path.join(path, SETTINGS_FILE)
    if not os.path.isfile(file):
        raise UserError(f"'{path}' holds no {SETTINGS_FILE}: give a folder written by tools/convert_ckpt.py")
    try:
        with open(file) as handle:
            settings = Settings(**json.load(handle))
            check_sizes(settings.matryoshka, "matryoshka")
            return settings
    except (ValueError, TypeError, UserError) as error:
        raise UserError(f"{file}: not the settings of an exported model ({error}): export it again") from error
