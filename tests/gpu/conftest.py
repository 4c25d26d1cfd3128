"""Before CUDA starts: a hardware queue for each of the streams that stand for ranks (see simulated.py), and modules that are
loaded when they are compiled: a load waits for the device, on which another rank may be waiting for this one."""

import os

os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")
os.environ.setdefault("CUDA_MODULE_LOADING", "EAGER")
