"""Stage 2: train many sparse autoencoders on one stream of activations."""
