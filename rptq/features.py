"""What a channel looks like to the clustering: its range, or the ranges of tensors that share one permutation."""

from __future__ import annotations

import torch
from torch import Tensor

from rptq.ranges import ChannelRange


def range_features(ranges: ChannelRange) -> Tensor:
    """(max, min) of each channel, float32 [C, 2] (RPTQ, arXiv 2304.01089)."""
    return torch.stack((ranges.max, ranges.min), dim=1)  # [C], [C] -> [C, 2]


def joint_features(*ranges: ChannelRange) -> Tensor:
    """(max, min) pairs of N tensors that are reordered together (q with k, v with the input of o), float32 [C, 2N].

    Each tensor is divided by its own largest magnitude: on raw values the larger one alone would decide the clusters.
    ValueError if the channel counts differ or no range is given.
    """
    counts = [r.min.numel() for r in ranges]
    if len(set(counts)) != 1:
        raise ValueError(f"joint features need one or more ranges of one channel count, got {counts}")
    return torch.cat([_normalised(range_features(r)) for r in ranges], dim=1)  # N x [C, 2] -> [C, 2N]


def _normalised(features: Tensor) -> Tensor:
    largest = features.abs().max() if features.numel() else features.new_ones(())
    return features / torch.where(largest > 0, largest, torch.ones_like(largest))
