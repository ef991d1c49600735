"""The thin trainer: distil a segmenter with the losses of this package. Needs the extra `[train]`."""
