"""Deep generative models: one contract for every family, one loop, one sampling engine."""

import os

# A sample's bits depend on its seed alone, and not on how many are drawn beside it, only if matrix products
# add up in one order whatever their size: MKL's strict mode, which it must be told before its first product.
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")

__version__ = "0.1.0"
