"""Leaf layers: one file for each family, with its equation, derivation and source."""

from jbackprop.layers.activations import Celu as Celu
from jbackprop.layers.activations import Elu as Elu
from jbackprop.layers.activations import Gelu as Gelu
from jbackprop.layers.activations import HardTanh as HardTanh
from jbackprop.layers.activations import Identity as Identity
from jbackprop.layers.activations import LeakyRelu as LeakyRelu
from jbackprop.layers.activations import Mish as Mish
from jbackprop.layers.activations import Relu as Relu
from jbackprop.layers.activations import Selu as Selu
from jbackprop.layers.activations import Sigmoid as Sigmoid
from jbackprop.layers.activations import Silu as Silu
from jbackprop.layers.activations import Softplus as Softplus
from jbackprop.layers.activations import Softsign as Softsign
from jbackprop.layers.activations import Tanh as Tanh
from jbackprop.layers.autodiff import Autodiff as Autodiff
from jbackprop.layers.dense import Dense as Dense
from jbackprop.layers.elementwise import Activation as Activation
from jbackprop.layers.elementwise import Elementwise as Elementwise
from jbackprop.layers.softmax import Softmax as Softmax
