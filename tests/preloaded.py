"""What processes of the tests begin with: the packages that take seconds to import, and nothing of `vim`."""

import matplotlib.pyplot
import sklearn.metrics
import timm.data
import timm.optim
import timm.scheduler
import torch.distributed.run
import torch.utils.flop_counter
import torch.utils.tensorboard
import torchvision.transforms.v2

__all__ = ["matplotlib", "sklearn", "timm", "torch", "torchvision"]
