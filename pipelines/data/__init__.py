"""Data pipeline from sources of images to batches.

In order: ``catalogue`` and ``source`` find images, ``decode`` decodes them, ``shard`` and ``split`` write them as a
data set, ``shuffle`` and ``partition`` assign images to steps and ranks, and ``loader`` reads batches.
"""
