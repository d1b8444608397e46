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
    return torch.where(above_median(head_divergence(z, z_text)), float(alpha), 1.0)


def head_divergence(z: torch.Tensor, z_text: torch.Tensor) -> torch.Tensor:
    """VHD of every head, outliers set to zero: float32 [num_heads].

    z, z_text: [num_heads, head_size], any float dtype; the arithmetic is float32.
    """
    return without_outliers(*head_statistics(z, z_text))


def head_statistics(z: torch.Tensor, z_text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """VHD, with outliers, and TA of every head, each float32 [num_heads].

    A head's are its own: those of a layer may be found in several places and put together.
    """
    text = z_text.float()
    return (z.float() - text).norm(dim=-1), text.square().sum(dim=-1)


def without_outliers(divergence: torch.Tensor, activity: torch.Tensor) -> torch.Tensor:
    """VHD with outliers set to zero; divergence and activity: VHD and TA of all heads."""
    outlier = (divergence > divergence.mean() + divergence.std()) & (
        activity > activity.mean() + activity.std()
    )
    return torch.where(outlier, 0.0, divergence)


def above_median(divergence: torch.Tensor) -> torch.Tensor:
    """Which heads are selected by their VHD; divergence: [num_heads]. Returns bool [num_heads]."""
    return divergence > divergence.median()
