"""matrix_sketch: the sketch of a linear layer's gradient where the matrix has been formed."""

from torch import Tensor

from rapidin.ops.backends import find
from rapidin.ops.checks import SKETCHED, check_sketch, check_tensor, nothing


def matrix_sketch(grad: Tensor, dim: int, *, seed: int, backend: str | None = None) -> Tensor:
    """Sketches matrices to `dim` numbers each: element (o, i) goes to bin (h_out(o) + h_in(i)) mod dim.

    grad: [..., O, I] float32, float16 or bfloat16, any strides -> [..., dim] float32

    The sketch is linear, and the dot product of two sketches estimates that of the two matrices without bias.
    Raises TypeError or ValueError on arguments that are not as above.
    """
    op = "matrix_sketch"
    check_sketch(op, dim, seed)
    check_tensor(op, "grad", grad, SKETCHED)
    if grad.ndim < 2:
        raise ValueError(f"{op}: grad must have at least 2 axes (out, in), got shape {tuple(grad.shape)}")
    run = find(op, backend, grad.device)
    if not grad.numel():
        return nothing(*grad.shape[:-2], dim, device=grad.device)
    result: Tensor = run(grad.detach(), dim, seed=seed)
    return result.float()
