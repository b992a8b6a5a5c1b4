"""Labels of patches, from segmentation masks."""
