"""Stage: do two dictionaries hold the same features? Correlations over the same images, and matches."""
