"""Stand-in for flash-attn, which needs nvcc: the four names that OpenRLHF imports at start-up."""

__version__ = "0.0.0"
