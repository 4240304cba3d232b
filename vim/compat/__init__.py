"""Stand-ins for the packages mamba-ssm and causal-conv1d, for models that import them.

`as_mamba_ssm` puts the stand-ins in place inside a `with` block, `install` for the rest of the process. They run on
`vim.ops`, so models of the Mamba family run and train on a CPU, without the two packages and their compilers.
`vim.compat.mamba_ssm` and `vim.compat.causal_conv1d` have the functions under their own names.
"""

from vim.compat import causal_conv1d, mamba_ssm
from vim.compat.stand_ins import PACKAGES, as_mamba_ssm, install, state_of

__all__ = ["PACKAGES", "as_mamba_ssm", "causal_conv1d", "install", "mamba_ssm", "state_of"]
