"""Detects collapse and saturation from the metrics of a generator's training."""

from __future__ import annotations

from collections.abc import Mapping

SURE = 0.995
"""Accuracy of the critic above which the generator learns almost nothing."""

POLE = 0.02
"""Transport cost between two halves of the real images below which a learned cost maps all of them to one point."""

SPREAD = 0.1
"""Variance of samples relative to held-out images, below which they count as collapsed."""

SEEN = 0.2
"""Coverage, and frequency of the rarest class, relative to real images, below which samples count as collapsed."""


def ailments(metrics: Mapping[str, float]) -> dict[str, str]:
    """Problems that the metrics show, as messages by kind.

    - ``saturation``: the critic is so accurate that its gradient no longer trains the generator (Arjovsky &
      Bottou 2017, "Towards principled methods for training generative adversarial networks");
    - ``collapse``: samples are alike, or miss a class or most of the images.

    Args:
        metrics: by name; names of evaluation metrics start with their split.
    """
    saturation, collapse = [], []
    for name, value in metrics.items():
        _, _, score = name.partition("_") if name.startswith(("test_", "validation_")) else ("", "", name)
        match score:
            case "critic_accuracy" if value >= SURE:
                saturation.append(f"the critic is right on {value:.1%} of images and samples")
            case "within_real" if value < POLE:
                saturation.append(
                    f"the critic sends all images to one point: their cost among themselves is {value:.2g}"
                )
            case "sample_spread" if value < SPREAD:
                collapse.append(f"samples vary {value:.1%} as much as images")
            case "coverage" if value < SEEN * (real := metrics.get(f"{name}_real", 0.0)):
                collapse.append(f"samples come near {value:.1%} of the images, real ones near {real:.1%}")
            case "smallest_class_share" if value < SEEN * (real := metrics.get(f"{name}_real", 1.0)):
                collapse.append(
                    f"the rarest class appears at {value:.1%} of the uniform frequency, in real images at {real:.1%}"
                )
    found = {"saturation": saturation, "collapse": collapse}
    return {kind: "; ".join(dict.fromkeys(texts)) for kind, texts in found.items() if texts}
