"""Patch labels, from segmentation masks."""
