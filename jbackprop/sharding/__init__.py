"""Where the parameters and the examples lie on a mesh of devices: rules by path of the parameter.

A rule of this library says nothing of devices. It computes with arrays, and where these lie on a
mesh, XLA splits the computation as they are split, and puts the collectives in:

    data parallel       the examples are split, every parameter is whole on each device; the
                        gradient is summed over the devices
    FSDP                the parameters, and with them gradient and optimizer state, are split too;
                        each is gathered where it is used, and its gradient summed and scattered
    tensor parallel     a layer's weights are split, and its outputs with them

A `Sharding` says which, for a network; `place` puts parameters where it says. Numbers are the same
with any, up to rounding. `docs/scaling.md` has what each sends. The mesh may have automatic axes
or, from JAX 0.7.0 on, explicit ones. With explicit ones a gradient lies where its parameter does.
With automatic ones the compiler decides, as with every JAX program, unless the `jax.jit` around
says it (`out_shardings`): say it, so that gradients of FSDP are never whole. `fit` does.
"""

from jbackprop.sharding.rules import Axes as Axes
from jbackprop.sharding.rules import Rule as Rule
from jbackprop.sharding.rules import Sharding as Sharding
from jbackprop.sharding.rules import check_mesh as check_mesh
from jbackprop.sharding.rules import data_parallel as data_parallel
from jbackprop.sharding.rules import fsdp as fsdp
from jbackprop.sharding.rules import paths as paths
from jbackprop.sharding.rules import place as place
from jbackprop.sharding.rules import put as put
from jbackprop.sharding.rules import specs_like as specs_like
from jbackprop.sharding.tensor_parallel import tensor_parallel as tensor_parallel
