"""TextDiff: segmentation from few labels and a sentence (after Feng, MICCAI 2024, arXiv 2407.05323)."""
