"""A kernel that needs local memory: registers cannot be indexed by a number that is not known."""

# No annotations from __future__: the DSL reads them as types.
import cutlass
from cutlass import Float32, Int32, cute


@cute.kernel
def _kernel(x: cute.Tensor, at: Int32):
    r_all = cute.make_rmem_tensor(64, Float32)
    r_all.fill(0.0)
    for i in cutlass.range(64, unroll=1):
        r_all[i * at % 64] = x[i]
    x[0] = r_all[at]


_kernel.set_name_prefix("local_memory", remove_cutlass_symbol=True, keep_mangled_name=False)


@cute.jit
def pick(x: cute.Tensor, at: Int32):
    """x[i] to place i * at % 64 of 64 registers, then x[0] from place `at`."""
    _kernel(x, at).launch(grid=(1, 1, 1), block=(32, 1, 1))
