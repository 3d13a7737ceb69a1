"""Self-contained HTML pages: what they show is in them, and they fetch nothing."""

import base64
import io
from pathlib import Path
from typing import Any

import jinja2
from matplotlib.figure import Figure
from PIL import Image

from deepfake_core.config import CLASS_COLOURS


def render_page(template: str, **values: Any) -> str:
    """Return a template of this folder, with every value escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(colours=CLASS_COLOURS, **values)


def encode_data(data: bytes, kind: str) -> str:
    """Return a data URL."""
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def encode_picture(image: Image.Image, pixels: int) -> str:
    """Return a picture, with at most so many pixels a side, as the data URL of a JPEG."""
    small = image.copy()
    small.thumbnail((pixels, pixels))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=85)
    return encode_data(buffer.getvalue(), "image/jpeg")


def encode_figure(figure: Figure, photographs: bool = False) -> str:
    """Return a figure as data URL: SVG, or JPEG where it shows photographs."""
    buffer = io.BytesIO()
    if photographs:
        figure.savefig(buffer, format="jpeg", dpi=90, pil_kwargs={"quality": 85})
        return encode_data(buffer.getvalue(), "image/jpeg")
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return encode_data(buffer.getvalue(), "image/svg+xml")
