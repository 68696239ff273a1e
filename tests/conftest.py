"""One thread per operation: on models this small more threads only wait for one another."""

import torch

torch.set_num_threads(1)
