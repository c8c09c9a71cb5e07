"""Draw samples of every served model of a dataset over HTTP into one picture, a class in each column.

    python tests/bench/gallery.py --url http://127.0.0.1:8000 --data digits --out assets/digits.png

Run it while the platform is up. The seed is 7: who repeats it, with the same versions, gets the same picture.
"""

import argparse
import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from gdl_ray.client import Client
from gdl_ray.images import png_grid

CLASSES = 10
SEED = 7
MARGIN = 12
TITLE = 26


def panel(client: Client, model: str, levels: int, rows: int) -> Image.Image:
    """Draw a grid of a model's samples under its family's name."""
    drawn = [client.sample(model, n=rows, seed=SEED, label=label) for label in range(CLASSES)]
    x = torch.from_numpy(np.stack(drawn, axis=1).reshape(-1, *drawn[0].shape[1:]))
    grid = Image.open(io.BytesIO(png_grid(x, levels, columns=CLASSES))).convert("L")
    picture = Image.new("L", (grid.width, grid.height + TITLE), 255)
    picture.paste(grid, (0, TITLE))
    ImageDraw.Draw(picture).text((0, 4), model.partition("-")[2], fill=0, font_size=16)
    return picture


def main() -> None:
    """Draw a panel for each model, two in a row."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="the platform's ingress")
    parser.add_argument("--data", default="digits", help="the dataset of the models")
    parser.add_argument("--rows", type=int, default=4, help="samples of each class")
    parser.add_argument("--columns", type=int, default=2, help="panels in a row")
    parser.add_argument("--out", type=Path, default=Path("gallery.png"))
    asked = parser.parse_args()
    client = Client(asked.url, timeout_s=600)
    names = [entry["name"] for entry in client.models() if entry["name"].startswith(f"{asked.data}-")]
    panels = []
    for name in names:
        levels = client.card(name)["data"]["levels"]
        panels.append(panel(client, name, levels, asked.rows))
        print(f"{name} drawn", flush=True)
    width, height = panels[0].width + MARGIN, panels[0].height + MARGIN
    picture = Image.new("L", (width * asked.columns, height * -(-len(panels) // asked.columns)), 255)
    for i, each in enumerate(panels):
        picture.paste(each, (width * (i % asked.columns), height * (i // asked.columns)))
    picture.save(asked.out, optimize=True)


if __name__ == "__main__":
    main()
