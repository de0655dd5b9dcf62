"""What is wrong with a generator's training, told from its curves."""

from __future__ import annotations

from collections.abc import Mapping

SURE = 0.995
"""Accuracy of a critic above which a generator learns next to nothing from it."""

POLE = 0.02
"""Cost of transport between two halves of real images, below which a learned cost has sent them all to one point."""

SPREAD = 0.1
"""Variance of samples, as a fraction of that of held-out images, below which they are taken to be one image."""

SEEN = 0.2
"""Coverage and share of the rarest class, as fractions of those of real images, below which samples leave most out."""


def ailments(metrics: Mapping[str, float]) -> dict[str, str]:
    """What a point of the curves says is wrong, by kind; empty where nothing is.

    - ``saturation``: the critic is so sure that its slope no longer moves the generator (Arjovsky & Bottou 2017,
      "Towards principled methods for training generative adversarial networks");
    - ``collapse``: samples are alike, or leave a class or most of the images out.

    Args:
        metrics: by name; those of evaluations have the split before them.
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
                collapse.append(f"the rarest class has {value:.1%} of an equal share, among real images {real:.1%}")
    found = {"saturation": saturation, "collapse": collapse}
    return {kind: "; ".join(dict.fromkeys(texts)) for kind, texts in found.items() if texts}
