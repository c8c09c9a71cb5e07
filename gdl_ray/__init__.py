"""Deep generative models: one contract for every family, one loop, one sampling engine."""

__version__ = "0.1.0"
