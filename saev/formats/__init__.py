"""Each on-disk format in one place: paths, schema, validation, atomic writing."""
