"""Images in, batches out.

In the order of the flow: ``catalogue`` and ``source`` find images, ``decode`` reads them, ``shard`` and ``split``
write them down as a data set, ``shuffle`` and ``partition`` say who sees which image when, ``loader`` brings it.
"""
