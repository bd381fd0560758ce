"""The pictures of a folder, as a model behind an endpoint gets them."""

from __future__ import annotations

import os
from pathlib import Path

from PIL import Image

from muco_ds.data.decode import ImageError, decode
from muco_ds.errors import UserError
from muco_ds.factory.endpoint import data_url
from muco_ds.factory.failures import PictureError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm")


def find_pictures(folder: Path) -> list[str]:
    """Paths below `folder` of the files that are named like pictures, sorted; hidden ones are left out.

    Raises:
        UserError: no such folder, or none in it.
    """
    if not folder.is_dir():
        raise UserError(f"--images: no such folder '{folder}'")
    names: list[str] = []
    seen: set[str] = set()
    for parent, folders, files in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(parent)) in seen:  # a link to where we were
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        names += [
            Path(parent, name).relative_to(folder).as_posix()
            for name in files
            if name.lower().endswith(SUFFIXES) and not name.startswith(".")
        ]
    if not names:
        raise UserError(f"--images: no picture in '{folder}': looked for {', '.join(SUFFIXES)}")
    return sorted(names)


def picture_url(path: Path, max_side: int) -> str:
    """The picture as a data URL, upright, its longer side at most `max_side`. Raises PictureError."""
    try:
        str(path).encode("utf-8")
        picture = decode(str(path))
    except UnicodeEncodeError as error:
        raise PictureError("picture", "the file's name is no UTF-8") from error
    except ImageError as error:
        raise PictureError("picture", str(error)) from error
    picture.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
    return data_url(picture)
