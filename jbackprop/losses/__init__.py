"""Losses: each knows its per-example cost, the delta of its input, and its prediction."""

from jbackprop.losses.base import Loss as Loss
from jbackprop.losses.canonical import Canonical as Canonical
from jbackprop.losses.canonical import PoissonNLL as PoissonNLL
from jbackprop.losses.canonical import SigmoidCrossEntropy as SigmoidCrossEntropy
from jbackprop.losses.canonical import SquaredError as SquaredError
from jbackprop.losses.fused import FusedSoftmaxCrossEntropy as FusedSoftmaxCrossEntropy
from jbackprop.losses.other import CrossEntropy as CrossEntropy
from jbackprop.losses.other import Huber as Huber
from jbackprop.losses.softmax import SoftmaxCrossEntropy as SoftmaxCrossEntropy
