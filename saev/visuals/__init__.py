"""Stage 3: for each latent, the images that fire it most, with heat maps."""
