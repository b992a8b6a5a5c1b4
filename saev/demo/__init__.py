"""The whole experiment on a laptop: mini-CUB, real DINOv2 weights, all four stages."""
