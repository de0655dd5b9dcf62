"""Judging networks on images that they were not trained on, in numbers and in pictures."""
