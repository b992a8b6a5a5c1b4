"""Image labels from any source: CUB, class folders, a table, or patch labels (docs/labels.md)."""
