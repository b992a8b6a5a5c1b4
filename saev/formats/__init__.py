"""One module per on-disk format: paths, schema, validation, atomic writing."""
