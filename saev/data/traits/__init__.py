"""Labels of images from any source: CUB, class folders, a table, or labels of patches (docs/labels.md)."""
