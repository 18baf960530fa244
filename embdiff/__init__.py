"""embdiff: text diffusion in a continuous embedding space."""
__version__ = "0.1.0"
