"""Head selection: which heads of a layer the image moves most, and their scale.

With z_h and z_text_h the output of head h at the last prompt position, with the image and without:

    VHD_h = || z_h - z_text_h ||_2          how much the image changes the head
    TA_h  = || z_text_h ||_2^2              how active it is on the text alone
    VHD_h = 0  where VHD_h > mean + std and TA_h > mean + std, each over the heads of the layer
    scale_h = alpha where VHD_h > median of VHD, after zeroing; else 1

Vision-aware Head Reinforcement, arXiv 2412.13949. The paper does not say which standard deviation
(here: the unbiased one) nor which median of an even number of heads (here: the lower one).
"""

from __future__ import annotations

import torch


def select_heads_reference(z: torch.Tensor, z_text: torch.Tensor, alpha: float) -> torch.Tensor:
    """The scale of every head, float32 [num_heads].

    z, z_text: [num_heads, head_size], any float dtype; the arithmetic is float32.
    alpha: scale of the selected heads.
    """
    text = z_text.float()
    difference = (z.float() - text).norm(dim=-1)
    activity = text.square().sum(dim=-1)
    outlier = (difference > difference.mean() + difference.std()) & (
        activity > activity.mean() + activity.std()
    )
    difference = torch.where(outlier, 0.0, difference)
    return torch.where(difference > difference.median(), float(alpha), 1.0)
