"""Whether PyTorch wants derivatives, of which varlen_fa computes none."""

import torch

from varlen_fa._errors import GradientError

# Why a call is left to others.
WANTED = "gradients are on: use torch.no_grad() or torch.inference_mode()"


def may_be_needed(*tensors):
    """Whether a gradient of one of the tensors may be wanted; those that are None want none."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def refuse(**arguments):
    """Raises GradientError if a gradient of an argument may be wanted: a tensor, a list of them, or None."""
    if not torch.is_grad_enabled():
        return
    for name, argument in arguments.items():
        if may_be_needed(*(argument if isinstance(argument, (list, tuple)) else (argument,))):
            raise GradientError(
                f"`{name}` requires a gradient, and varlen_fa computes none: call it under torch.no_grad() or "
                f"torch.inference_mode(), or give `{name}.detach()`"
            )
