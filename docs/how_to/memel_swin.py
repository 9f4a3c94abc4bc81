"""MEmeL on Swin: images of stripes, four modules in the middle of the third stage.

python docs/how_to/memel_swin.py

A class is a direction of stripes of any width and place, under noise; the images are generated.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import memel
import torch
from torch import Tensor, nn

import l2e

SIZE, CLASSES, BATCH = 32, 6, 32
IMAGES, VALIDATION, NOISE = 1024, 512, 1.5


def main() -> None:
    arguments = memel.parser(__doc__, steps=150).parse_args()
    images, labels = stripes(IMAGES, seed=0)
    unseen, their_labels = stripes(VALIDATION, seed=1)

    def train(config: l2e.L2EConfig, seed: int) -> memel.Scores:
        torch.manual_seed(seed)
        model = small()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        handle = l2e.attach(model, "swin.encoder.layers.2.blocks.*.mlp.activation_fn", config)
        model.train()
        for numbers in memel.orders(IMAGES, BATCH, arguments.steps, seed):
            loss = model(pixel_values=images[numbers], labels=labels[numbers]).loss
            (loss + handle.loss()).backward()
            optimizer.step()
            optimizer.zero_grad()
            handle.step()
        with torch.no_grad():
            logits = model.eval()(pixel_values=unseen).logits
        return {
            "loss": nn.functional.cross_entropy(logits, their_labels).item(),
            "accuracy": (logits.argmax(1) == their_labels).double().mean().item(),
        }

    memel.compare(train, [1, 2, 3, 4], arguments)


def stripes(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Images [count, 1, SIZE, SIZE] and the number of their stripes' direction [count]."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (count,), generator=generator)
    angle = (labels * math.pi / CLASSES)[:, None, None]
    frequency, phase = torch.rand(2, count, 1, 1, generator=generator)
    row, column = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    along = row * angle.sin() + column * angle.cos()
    waves = torch.sin((0.3 + 0.7 * frequency) * along + 2 * math.pi * phase)
    noise = torch.randn(count, SIZE, SIZE, generator=generator)
    return (waves + NOISE * noise)[:, None], labels


def small() -> nn.Module:
    """Swin's four stages, the third of six blocks, as wide as a laptop likes."""
    from transformers import SwinConfig, SwinForImageClassification

    return SwinForImageClassification(
        SwinConfig(
            image_size=SIZE,
            patch_size=2,
            num_channels=1,
            embed_dim=16,
            depths=[2, 2, 6, 2],
            num_heads=[1, 2, 4, 8],
            window_size=2,
            num_labels=CLASSES,
        )
    )


if __name__ == "__main__":
    main()
