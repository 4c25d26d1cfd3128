"""Before CUDA starts: a hardware queue for each of the streams that stand for ranks (see simulated.py)."""

import os

os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")
