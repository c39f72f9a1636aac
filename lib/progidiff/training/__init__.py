"""Training: cached slices, losses, one loop, and the recipes `pretrain` and `train`."""
