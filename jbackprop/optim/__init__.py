"""Second-order optimizers, as Optax gradient transformations."""

from jbackprop.optim.damping import LevenbergMarquardt as LevenbergMarquardt
from jbackprop.optim.hessian_free import HessianFreeState as HessianFreeState
from jbackprop.optim.hessian_free import hessian_free as hessian_free
from jbackprop.optim.kfac import KfacState as KfacState
from jbackprop.optim.kfac import kfac as kfac
